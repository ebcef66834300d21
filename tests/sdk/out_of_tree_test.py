#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A plugin's author has the installed package and nothing else: installs it to a fresh prefix, copies the
example plugins away, builds them with each compiler here and looks at what came out.

  out_of_tree_test.py --build BUILD --source SOURCE [--kernels]   needs cmake, readelf, nm"""
import argparse
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

FOREIGN = re.compile(r"rocksdb|cuda|cublas|daemon|storage|zmq|spdlog|nlohmann", re.I)


class Failure(Exception):
    pass


def run(*command, **more):
    done = subprocess.run([str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **more)
    if done.returncode != 0:
        raise Failure(f"{' '.join(map(str, command))}: exit {done.returncode}\n{done.stdout}")
    return done.stdout


def need(condition, message):
    if not condition:
        raise Failure(message)


def install(build, prefix, kernels):
    for component in ["sdk"] + (["kernels"] if kernels else []):
        run("cmake", "--install", build, "--component", component, "--prefix", prefix)
    files = sorted(p for p in prefix.rglob("*") if p.is_file())
    names = [str(p.relative_to(prefix)) for p in files]
    for wanted in ("include/ds/plugin.h", "include/ds/plugin.hpp", "DriftstoneConfig.cmake", "DriftstonePlugin.cmake",
                   "plugin.map", "plugin-sdk.md"):
        need(any(n.endswith(wanted) for n in names), f"{wanted} is not among the installed files: {names}")
    # The loader of the CUDA kernels needs nothing of CUDA: its includes are judged below as all are.
    foreign = [n for n in names if FOREIGN.search(n) and not n.endswith("kernels/cuda/backend.h")]
    need(not foreign, f"files of other parts are installed: {foreign}")
    for file in files:
        if file.suffix in (".h", ".hpp"):
            strange = [l for l in file.read_text().splitlines() if l.startswith("#include") and FOREIGN.search(l)]
            need(not strange, f"{file}: {strange}")
    return next((p for p in files if p.name == "ds-plugin-check"), None)


def exports(file):
    return [line.split()[-1] for line in run("nm", "-D", "--defined-only", file).splitlines() if line.strip()]


def judge(file):
    found = exports(file)
    need(found == ["ds_plugin_entry_v1"], f"{file.name} exports {found}, expected ds_plugin_entry_v1 alone")
    note = run("readelf", "-n", file)
    need(re.search(r"\.note\.driftstone.*Driftstone\s+0x00000070", note, re.S), f"{file.name} has no note:\n{note}")
    dynamic = run("readelf", "-d", file)
    for tag in ("RUNPATH", "RPATH", "TEXTREL"):
        need(f"({tag})" not in dynamic, f"{file.name} has a {tag}:\n{dynamic}")
    need("BIND_NOW" in dynamic, f"{file.name} binds lazily:\n{dynamic}")


def configure_and_build(source, build, prefix, c, cxx):
    # An environment without hints: only the prefix leads to Driftstone.
    clean = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "CCACHE_DIR", "LANG")}
    run("cmake", "-S", source, "-B", build, f"-DCMAKE_PREFIX_PATH={prefix}", f"-DCMAKE_C_COMPILER={c}",
        f"-DCMAKE_CXX_COMPILER={cxx}", "-DCMAKE_C_FLAGS=-Wall -Wextra -pedantic -Werror",
        "-DCMAKE_CXX_FLAGS=-Wall -Wextra -pedantic -Werror", env=clean)
    cache = (build / "CMakeCache.txt").read_text()
    need(f"Driftstone_DIR:PATH={prefix}/" in cache, f"found another Driftstone than {prefix}")
    run("cmake", "--build", build, "--parallel", "1", env=clean)
    return sorted(build.glob("*.so"))


def examples(source, folder, prefix, checker, c, cxx):
    if shutil.which(c) is None or shutil.which(cxx) is None:
        print(f"{cxx}: skipped, not on this machine")
        return
    away = folder / f"examples-{cxx}"
    shutil.copytree(source / "examples" / "plugins", away)
    plugins = configure_and_build(away, folder / f"build-{cxx}", prefix, c, cxx)
    wanted = re.findall(r"ds_add_plugin\(([\w-]+)", (away / "CMakeLists.txt").read_text())
    need(len(wanted) >= 8 and [p.stem for p in plugins] == sorted(wanted), f"built {plugins}, expected {wanted}")
    for plugin in plugins:
        judge(plugin)
        if checker is not None:
            run(checker, "--level", "1", plugin)
    print(f"{cxx}: {len(plugins)} plugins, checked to level 1: {'yes' if checker else 'no, the kit is not built'}")


def without_exceptions(source, folder, prefix):
    """The C example as C++ without exceptions and RTTI: the C header asks for neither."""
    file = folder / "bare.so"
    run("c++", "-x", "c++", "-std=c++20", "-fno-exceptions", "-fno-rtti", "-O2", "-fPIC", "-shared",
        "-fvisibility=hidden", "-Wl,-z,now,-z,defs", f"-I{prefix}/include",
        source / "examples" / "plugins" / "block_int4.c", "-o", file)
    judge(file)
    print("c++ -fno-exceptions -fno-rtti: 1 plugin")


def c_only(source, folder, prefix):
    """A project without C++, and with a search path of its own, which a plugin may not get."""
    away = folder / "c-only"
    away.mkdir()
    shutil.copy(source / "examples" / "plugins" / "block_int4.c", away)
    (away / "CMakeLists.txt").write_text("""cmake_minimum_required(VERSION 3.25)
project(c_only LANGUAGES C)
set(CMAKE_INSTALL_RPATH /opt/somewhere)
set(CMAKE_BUILD_WITH_INSTALL_RPATH ON)
find_package(Driftstone REQUIRED COMPONENTS SDK)
ds_add_plugin(block-int4 SOURCES block_int4.c LIBS m)
""")
    run("cmake", "-S", away, "-B", away / "build", f"-DCMAKE_PREFIX_PATH={prefix}")
    run("cmake", "--build", away / "build")
    judge(away / "build" / "block-int4.so")
    print("C only: 1 plugin")


MISTAKES = {  # what the compiler says to each
    "void save(int) const {}": "save: the class has it, but with another signature",
    "void linear(ds_call&, const ds_linear_args&) {}": "linear: the class has it, but with another signature",
    "": "none of encoder, attention, quantizer",
}


def mistakes(folder, prefix):
    """A class that is slightly wrong does not become a plugin that quietly lacks something."""
    whole = """
  ds_qformat format(std::int64_t, std::int64_t) { return {}; }
  void quantize(const ds_call&, std::string_view, const ds_tensor&, const ds_qweight&) {}
  void dequantize(const ds_call&, const ds_qweight&, const ds_tensor&) {}
"""
    for member, said in {**MISTAKES, "void linear(const ds_call&, const ds_linear_args&) {}": None}.items():
        file = folder / "mistake.cpp"
        file.write_text('#include "ds/plugin.hpp"\nstruct q {\n  static constexpr std::string_view name = "q";\n'
                        f"  explicit q(ds::sdk::context) {{}}\n  {member}{whole if member else ''}}};\n"
                        'DS_PLUGIN("a.b", "1.0.0", "MIT", q)\n')
        done = subprocess.run(["c++", "-std=c++20", "-fsyntax-only", f"-I{prefix}/include", file], text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        need((done.returncode == 0) == (said is None) and (said is None or said in done.stdout),
             f"'{member}': expected {said or 'success'}, the compiler says\n{done.stdout}")


def kernel_user(source, folder, prefix):
    """A module of our own, built as a third party would: the package and the sources of that module."""
    away = folder / "kernel-user"
    shutil.copytree(source / "modules" / "attention", away / "modules" / "attention")
    shutil.copy(source / "modules" / "device_ops.h", away / "modules")
    (away / "CMakeLists.txt").write_text("""cmake_minimum_required(VERSION 3.25)
project(kernel_user LANGUAGES C CXX)
find_package(Driftstone REQUIRED COMPONENTS SDK Kernels)
ds_add_plugin(dense SOURCES modules/attention/dense.cpp LIBS Driftstone::Kernels)
target_include_directories(dense PRIVATE .)
""")
    for plugin in configure_and_build(away, folder / "build-kernel-user", prefix, "cc", "c++"):
        judge(plugin)
    print("Driftstone::Kernels: 1 plugin")


def refusals(folder, prefix):
    """What an author may get wrong is said by name."""
    for name, asked, said in (("nothing", "SDK Nothing", "Nothing"), ("version", "9.0 SDK", "9.0")):
        where = folder / f"refuse-{name}"
        where.mkdir()
        version, components = (asked.split() + [""])[:2] if asked[0].isdigit() else ("", asked)
        (where / "CMakeLists.txt").write_text(
            "cmake_minimum_required(VERSION 3.25)\nproject(p LANGUAGES CXX)\n"
            f"find_package(Driftstone {version} REQUIRED COMPONENTS {components})\n")
        try:
            run("cmake", "-S", where, "-B", where / "build", f"-DCMAKE_PREFIX_PATH={prefix}")
        except Failure as failure:
            need(said in str(failure), f"{name}: the message does not name {said}:\n{failure}")
            continue
        raise Failure(f"find_package(Driftstone {asked}) succeeded")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--build", required=True, type=pathlib.Path)
    parser.add_argument("--source", required=True, type=pathlib.Path)
    parser.add_argument("--kernels", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ds-sdk-") as name:
        folder = pathlib.Path(name).resolve()
        prefix = folder / "prefix"
        checker = install(given.build, prefix, given.kernels)
        for c, cxx in (("gcc", "g++"), ("clang", "clang++")):
            examples(given.source, folder, prefix, checker, c, cxx)
        without_exceptions(given.source, folder, prefix)
        c_only(given.source, folder, prefix)
        mistakes(folder, prefix)
        if given.kernels:
            kernel_user(given.source, folder, prefix)
        refusals(folder, prefix)


if __name__ == "__main__":
    try:
        main()
    except Failure as failure:
        sys.exit(f"failed: {failure}")
