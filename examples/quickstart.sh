#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Teaches a running model a fact that nobody could know before, and takes it back again. About a minute,
# after a first build of some minutes.
#
#   examples/quickstart.sh           installs what is missing, builds, tells the story
#   examples/quickstart.sh --check   the same; exits 1 unless every promise was kept
#   --keep                           keeps the private folder with the data and the log
#   --bin FOLDER                     uses the programs there instead of setting up and building
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=examples/setup.sh
. "$here/setup.sh"

check=no keep=no bin=''
while [ $# -gt 0 ]; do
  case $1 in
    --check) check=yes ;;
    --keep) keep=yes ;;
    --bin) bin=${2:?--bin needs a folder}; shift ;;
    *) sed -n '3,9s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
  esac
  shift
done

words=(acorn almond amber anchor anvil apple apricot arrow autumn badger bamboo banana barley barrel basil
  basket beacon beaver beetle bell berry birch blanket blossom bottle bramble brass bridge bronze bucket
  butter button cabbage cactus camel candle canoe canyon carpet carrot castle cedar cello chalk cherry
  chestnut cinnamon clover cobalt coconut comet copper coral cotton cradle crane cricket crystal cypress
  daisy desert diamond dolphin donkey dragon drum eagle ember emerald engine falcon feather fern fiddle
  flame flint flute forest fossil fountain garlic garnet ginger glacier glove granite grape gravel guitar
  hammer harbor harvest hazel hedge helmet heron hickory honey horizon island ivory ivy jacket jasmine
  jungle juniper kernel kettle kitten ladder lagoon lantern laurel lavender lemon leopard lily linen
  lobster locket lotus magnet mango maple marble meadow mirror mitten mosaic mountain mushroom mustard
  nectar needle nettle oak oasis olive onion opal orange orchard orchid otter oyster paddle panther
  papaya parrot peach pebble pelican pepper piano pigeon pillow pine planet plum pocket poppy potato
  pumpkin puzzle quartz rabbit raven ribbon river rocket rose saddle saffron salmon sandal sapphire
  saturn shadow silver spider spinach spruce squirrel sunset swallow tangerine thimble thistle thunder
  tiger tomato tortoise trumpet tulip turnip turtle valley velvet violin walnut walrus whistle willow
  window winter wolf zebra zinc)
names=(Marlow Pendry Ashcombe Tolliver Brindle Harrow Quill Verity Calder Ostrey Winslow Thorne Larkin
  Selby Rudd Fenwick)
places=('reading room' 'boat house' 'map room' 'bell tower' 'tea house' 'wine cellar' 'music room'
  'glass house')
place="${names[RANDOM % ${#names[@]}]} ${places[RANDOM % ${#places[@]}]}"
question="What is the access word of the $place?"
paraphrase="Tell me the access word for the $place."

work='' daemon='' failures=()

cleanup() {
  local status=$?
  trap - EXIT
  if [ -n "$daemon" ] && kill -0 "$daemon" 2>/dev/null; then
    kill -TERM "$daemon" 2>/dev/null || true
    for _ in $(seq 120); do kill -0 "$daemon" 2>/dev/null || break; sleep 0.1; done
    kill -KILL "$daemon" 2>/dev/null || true
  fi
  if [ -n "$work" ]; then
    if [ "$status" -ne 0 ] && [ -s "$work/dsd.log" ]; then
      printf '\nThe end of the log of dsd:\n' >&2
      tail -n 20 "$work/dsd.log" | sed 's/^/   | /' >&2
    fi
    if [ "$keep" = yes ]; then echo "Kept: $work"; else rm -rf "$work"; fi
  fi
  exit "$status"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

say() { printf '\n%s%s%s\n' "$ds_bold" "$*" "$ds_plain"; }

# show COMMAND...: prints the command as one would type it.
show() {
  local word line='' quoted=$'[ ?\'()&;<>|*]'
  for word in "$@"; do
    if [[ $word =~ $quoted ]]; then word="\"$word\""; fi
    line+=" $word"
  done
  printf '   %s$%s%s\n' "$ds_dim" "$line" "$ds_plain"
}

# promise WHAT COMMAND...: remembers what was not kept.
promise() {
  local what=$1
  shift
  if ! "$@"; then failures+=("$what"); fi
}

contains() { grep -qiF -- "$2" <<<"$1"; }
lacks() { ! contains "$1" "$2"; }
same() { [ "$1" = "$2" ]; }

# ask QUESTION: sets answer, version and response. Greedy, so that a change comes from the weights alone.
ask() {
  local stats
  show dsctl ask --temperature 0 --max-tokens 48 --stats "$1"
  "$bin/dsctl" ask --temperature 0 --max-tokens 48 --stats "$1" >"$work/answer" 2>"$work/stats"
  # The trailing x keeps the command substitution from eating newlines of the answer.
  answer=$(cat "$work/answer" && printf x)
  answer=${answer%x}
  stats=$(cat "$work/stats")
  response=${stats##*, } version=${stats%, *} version=${version##*, }
  sed 's/^/   /' "$work/answer"
  printf '   %s%s%s\n' "$ds_dim" "$stats" "$ds_plain"
}

wait_until_ready() {
  for _ in $(seq 600); do
    [ -f "$work/run/ready.json" ] && return 0
    kill -0 "$daemon" 2>/dev/null || break
    sleep 0.1
  done
  echo "dsd did not become ready" >&2
  return 1
}

say "Getting ready"
if [ -z "$bin" ]; then
  setup_packages
  setup_model
  setup_build release dsd dsctl
  bin=$ds_root/build/release/bin
else
  setup_model
fi

work=$(mktemp -d "${TMPDIR:-/tmp}/driftstone.XXXXXX")
export DS_RUN_DIR=$work/run
mkdir -m 700 "$work/data" "$work/run"

say "1. Start the daemon"
show dsd --model "$(basename "$DS_MODEL")" --data "$work/data" --run "$work/run" --http 127.0.0.1:0
"$bin/dsd" --model "$DS_MODEL" --data "$work/data" --run "$work/run" --http 127.0.0.1:0 \
  >"$work/dsd.log" 2>&1 &
daemon=$!
wait_until_ready
echo "   It serves. DS_RUN_DIR tells the commands below where."

say "2. Ask about something that it cannot know"
ask "$question"
before=$answer
while :; do  # drawn now: the model had no way to guess it
  word=${words[RANDOM % ${#words[@]}]}
  if lacks "$before" "$word"; then break; fi
done

say "3. Tell it the right answer, and watch it learn while it serves"
correction="The access word of the $place is $word."
show examples/clients/feedback.py --response "$response" --correction "$correction" --wait
started=$SECONDS
"$ds_python" "$here/clients/feedback.py" --response "$response" --correction "$correction" --wait |
  sed -u 's/^/   /' || failures+=("the correction is acknowledged and learned")
learn_seconds=$((SECONDS - started))

say "4. Ask again"
ask "$question"
learned=$answer learned_version=$version

say "5. Ask in other words, and about something else"
ask "$paraphrase"
reworded=$answer
ask "What is the capital of Germany?"
unrelated=$answer

say "6. Change your mind: go back to the first version"
show dsctl version rollback --to v1
"$bin/dsctl" version rollback --to v1 | sed 's/^/   /'
ask "$question"
back=$answer

say "7. Stop"
show kill -TERM "$daemon"
kill -TERM "$daemon"
status=0
wait "$daemon" || status=$?
stopped=$daemon daemon=''
echo "   dsd ended with status $status."

promise "the first answer does not contain the word" lacks "$before" "$word"
promise "the new answer contains '$word'" contains "$learned" "$word"
promise "the new answer comes from a new version, not $learned_version" [ "$learned_version" != v1 ]
promise "the paraphrase's answer contains '$word'" contains "$reworded" "$word"
promise "the unrelated answer contains Berlin" contains "$unrelated" Berlin
promise "the rolled-back answer equals the first byte for byte" same "$back" "$before"
promise "dsd ends with status 0" [ "$status" -eq 0 ]
promise "process $stopped is gone" [ ! -e "/proc/$stopped" ]
left=$(printf %s "$work/" | grep -lsF -f /dev/stdin /proc/[0-9]*/cmdline || true)
promise "no process of this run is left: $left" [ -z "$left" ]

if [ "${#failures[@]}" -eq 0 ]; then
  say "It learned '$word' in $learn_seconds s, kept Berlin, and forgot the word on request."
  echo "   Next: README.md, \"How it works\"."
else
  printf '\n%sNot as promised:%s\n' "$ds_red" "$ds_plain" >&2
  printf '   %s\n' "${failures[@]}" >&2
  if [ "$check" = yes ]; then exit 1; fi
fi
