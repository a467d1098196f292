# Shared by the launch scripts, which set `me` and define `usage`. Sourced, not run.
# shellcheck shell=bash
# shellcheck disable=SC2034,SC2154  # variables that the scripts read, and set

fail() {
  echo "$me: $1 (see --help)" >&2
  exit 2
}

# Prints a command so that it can be pasted.
show() {
  local word line=""
  for word in "$@"; do
    if [[ ! "$word" =~ ^[A-Za-z0-9_./:=@%+,~-]+$ ]]; then
      word="'$(printf '%s' "$word" | sed "s/'/'\\\\''/g")'"
    fi
    line+="$word "
  done
  echo "${line% }"
}

# Prints a command and runs it, unless this is a dry run.
run() {
  show "$@"
  if [[ -z "$dry_run" ]]; then "$@"; fi
}

# parse_flags ACTIONS SWITCHES FLAGS "$@": sets the variable of each flag that is given, `action` to a first word that
# is one, and `train_flags` to what follows --.
parse_flags() {
  local _actions=" $1 " _switches=" $2 dry_run " _flags=" $3 " _flag _value
  shift 3
  train_flags=()
  if [[ $# -gt 0 && "$1" != -* && "$_actions" == *" $1 "* ]]; then
    action="$1"
    shift
  fi
  while [[ $# -gt 0 ]]; do
    _flag="${1%%=*}"
    if [[ "$1" == --help ]]; then
      usage
      exit 0
    elif [[ "$1" == -- ]]; then
      shift
      train_flags=("$@")
      return
    elif [[ "$_flag" == --* && "$_switches" == *" ${_flag#--} "* ]]; then
      [[ "$1" == "$_flag" ]] || fail "$_flag takes no value"
      printf -v "${_flag#--}" 1
      shift
    elif [[ "$_flag" == --* && "$_flags" == *" ${_flag#--} "* ]]; then
      if [[ "$1" == *=* ]]; then
        _value="${1#*=}"
        shift
      else
        [[ $# -ge 2 ]] || fail "$_flag needs a value"
        _value="$2"
        shift 2
      fi
      [[ -n "$_value" && "$_value" != --* ]] || fail "$_flag needs a value"
      printf -v "${_flag#--}" '%s' "$_value"
    else
      fail "unknown flag $1"
    fi
  done
}

# need FLAG...: refuses a command line without them.
need() {
  local _name
  for _name in "$@"; do
    [[ -n "${!_name}" ]] || fail "--$_name is missing"
  done
}

# number FLAG...: refuses values that are not whole numbers from 1 on.
number() {
  local _name
  for _name in "$@"; do
    [[ "${!_name}" =~ ^[1-9][0-9]*$ ]] || fail "--$_name ${!_name} is not a number from 1 on"
  done
}
