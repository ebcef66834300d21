#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The ABI's layout as a table, and whether a newer header only grew.

  abi.py layout HEADERS            every struct's size, every field's place and type, every enumerator
  abi.py grow OLD.layout NEW.layout   says what breaks plugins of the old one; exit 1 if anything does
  abi.py variant KIND HEADERS OUT  a changed copy: grown (the next minor), insert, widen or renumber
  abi.py release VERSION           keeps the headers of sdk/ as those of VERSION, and their layout

HEADERS is a folder that holds ds/plugin.h. Clang reads the header, a probe that it compiles measures it."""
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
HEADERS = ["plugin.h", "plugin_kinds.h", "parallel.h", "plugin.hpp", "plugin_kinds.hpp", "plugin_views.hpp"]


def declarations(headers):
    """Structs as {name: [(field, type)]}, enumerators, typedefs of anything else, in the header's order."""
    command = ["clang", "-std=c11", f"-I{headers}", "-x", "c", "-fsyntax-only", "-Xclang", "-ast-dump=json",
               str(headers / "ds" / "plugin.h")]
    tree = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    structs, enumerators, types = {}, [], {}
    for node in tree["inner"]:
        name = node.get("name", "")
        if node["kind"] == "RecordDecl" and name.startswith("ds_") and node.get("completeDefinition"):
            structs[name] = [(field["name"], field["type"]["qualType"].replace("struct ", ""))
                             for field in node.get("inner", []) if field["kind"] == "FieldDecl"]
        elif node["kind"] == "EnumDecl":
            enumerators += [c["name"] for c in node["inner"] if c["name"].startswith("DS_")]
        elif node["kind"] in ("TypedefDecl", "FunctionDecl") and name.startswith("ds_"):
            types[name] = node["type"]["qualType"]
    return structs, enumerators, {n: t for n, t in types.items() if n not in structs and t != f"struct {n}"}


def layout(headers):
    headers = pathlib.Path(headers).resolve()
    structs, enumerators, types = declarations(headers)
    lines = ['#include <stdio.h>', '#include "ds/plugin.h"', "int main(void) {",
             'printf("major %u\\nminor %u\\nentry %s\\n", DS_ABI_MAJOR, DS_ABI_MINOR, DS_ENTRY_NAME);']
    for name, fields in structs.items():
        lines.append(f'printf("struct {name} %zu\\n", sizeof({name}));')
        for field, kind in fields:
            lines.append(f'printf("field {name}.{field} %zu %zu {kind}\\n", offsetof({name}, {field}), '
                         f"sizeof((({name}*)0)->{field}));")
    lines += [f'printf("enum {e} %lld\\n", (long long){e});' for e in enumerators]
    lines += [f'printf("type {name} {kind}\\n");' for name, kind in sorted(types.items())]
    with tempfile.TemporaryDirectory() as folder:
        probe = pathlib.Path(folder, "probe")
        subprocess.run(["clang", "-std=c11", f"-I{headers}", "-x", "c", "-", "-o", str(probe)], check=True,
                       input="\n".join(lines + ["return 0;", "}", ""]), text=True)
        return subprocess.run([probe], check=True, capture_output=True, text=True).stdout


def parsed(text):
    table = {"struct": {}, "field": {}, "enum": {}, "type": {}, "major": {}, "minor": {}, "entry": {}}
    for line in text.splitlines():
        kind, name, *rest = line.split(" ", 2)
        table[kind][name] = rest[0] if rest else ""
    return table


def fields_of(table, struct):
    """[(name, offset, size, type)] in order."""
    out = []
    for name, value in table["field"].items():
        if name.startswith(struct + "."):
            offset, size, kind = value.split(" ", 2)
            out.append((name.split(".")[1], int(offset), int(size), kind))
    return out


def struct_breaks(name, old, new):
    if name not in new["struct"]:
        return [f"{name}: is gone"]
    before, after = fields_of(old, name), fields_of(new, name)
    growable = before and before[0][0] == "size"
    found = []
    for index, field in enumerate(before):
        if index >= len(after):
            found.append(f"{name}.{field[0]}: is gone")
        elif field != after[index]:
            now = after[index]
            found.append(f"{name}.{field[0]}: was field {index} at {field[1]}, {field[2]} bytes, {field[3]}; there is "
                         f"now {now[0]} at {now[1]}, {now[2]} bytes, {now[3]}")
    if not found and not growable and (len(after) > len(before) or old["struct"][name] != new["struct"][name]):
        found.append(f"{name}.{after[-1][0]}: a struct without size may not grow, {old['struct'][name]} to "
                     f"{new['struct'][name]} bytes")
    return found


def holes(new):
    found = []
    for name, size in new["struct"].items():
        end = 0
        for field, offset, length, _ in fields_of(new, name):
            if offset != end:
                found.append(f"{name}.{field}: {offset - end} bytes of padding before it")
            end = offset + length
        if end != int(size):
            found.append(f"{name}: {int(size) - end} bytes of padding at its end")
    return found


def breaks(old_text, new_text):
    """What in the new header breaks a plugin or host built with the old one."""
    old, new = parsed(old_text), parsed(new_text)
    found = [line for name in old["struct"] for line in struct_breaks(name, old, new)]
    for kind in ("enum", "type", "major", "entry"):
        for name, value in old[kind].items():
            now = new[kind].get(name, "gone")
            if now != value:
                found.append(f"{kind} {name}: was {value}, is {now}")
    if int(next(iter(new["minor"]))) < int(next(iter(old["minor"]))):
        found.append("the minor went down")
    return found + holes(new)


STRUCT = re.compile(r"typedef struct (ds_\w+) \{(.*?)\n\} \1;", re.S)


def grown(text):
    def tail(match):
        body = re.sub(r"/\*.*?\*/", "", match[2], flags=re.S).strip()
        more = "\n  uint64_t tail;" if body.startswith("uint32_t size;") else ""
        return f"typedef struct {match[1]} {{{match[2]}{more}\n}} {match[1]};"

    return re.sub(r"(#define DS_ABI_MINOR )(\d+)", lambda m: m[1] + str(int(m[2]) + 1), STRUCT.sub(tail, text))


CHANGES = {
    "grown": grown,
    "insert": lambda text: re.sub(r"(typedef struct ds_quantizer \{.*?)(\n  ds_code \(\*format\))",
                                  r"\1\n  ds_code (*early)(ds_instance*);\2", text, flags=re.S),
    "widen": lambda text: re.sub(r"\bfloat rel_tol;", "double rel_tol;", text),
    "renumber": lambda text: text.replace("DS_F8_E5M2 = 12", "DS_F8_E5M2 = 16"),
}


def variant(kind, headers, out):
    folder = pathlib.Path(out) / "ds"
    folder.mkdir(parents=True, exist_ok=True)
    changed = False
    for file in sorted((pathlib.Path(headers) / "ds").iterdir()):
        text = file.read_text()
        new = CHANGES[kind](text) if file.suffix == ".h" else text
        changed = changed or new != text
        (folder / file.name).write_text(new)
    if not changed:
        raise SystemExit(f"variant {kind}: nothing in {headers} looks as expected")


def release(version):
    folder = HERE / "headers" / version / "ds"
    folder.mkdir(parents=True, exist_ok=True)
    for name in HEADERS:
        shutil.copy(HERE.parent.parent / "sdk" / "include" / "ds" / name, folder / name)
    (HERE / f"v{version}.layout").write_text(layout(folder.parent))


def main(command, *arguments):
    if command == "layout":
        print(layout(*arguments), end="")
    elif command == "variant":
        variant(*arguments)
    elif command == "release":
        release(*arguments)
    else:
        found = breaks(*(pathlib.Path(a).read_text() for a in arguments))
        print("\n".join(found))
        return 1 if found else 0
    return 0


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] not in ("layout", "grow", "variant", "release"):
        raise SystemExit(__doc__)
    sys.exit(main(*sys.argv[1:]))
