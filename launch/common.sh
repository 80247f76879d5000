# shellcheck shell=bash
# What the launchers share. Each is called as `launch/X.sh [start|logs|stop] [--dry-run] [--config.FIELD=VALUE ...]`.
set -euo pipefail

die() {
  echo "$(basename "$0"): error: $*" >&2
  exit 2
}

action=start dry_run="" fields=()
for word in "$@"; do
  case $word in
    start | logs | stop | job | watch) action=$word ;; # the last two are how launchers call themselves
    --dry-run) dry_run=yes ;;
    --config.*=*) fields+=("$word") ;;
    --help)
      sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
      exit
      ;;
    *) die "unknown argument $word; see $0 --help" ;;
  esac
done

# need NAME WHAT: the environment variable must be set.
need() { [[ -n ${!1-} ]] || die "set $1, $2"; }

# whole NAME WHAT: it must be a whole number.
whole() {
  need "$@"
  [[ ${!1} =~ ^[1-9][0-9]{0,3}$ ]] || die "$1 ${!1}: expected a whole number, $2"
}

tools() {
  local tool
  for tool in "$@"; do command -v "$tool" >/dev/null || die "$tool is not on PATH"; done
}

# Words as a shell reads them.
quoted() {
  local word
  for word in "$@"; do
    [[ $word =~ ^[-+A-Za-z0-9_./=:,@%]+$ ]] || word=${word@Q}
    printf ' %s' "$word"
  done
}

# Prints a command and runs it; a dry run only prints it.
run() {
  echo "+$(quoted "$@")"
  [[ -n $dry_run ]] || "$@"
}

# detach FILE COMMAND: runs it without this terminal, what it prints goes to $logs/FILE, its number to $logs/pid.
detach() {
  ! is_running || die "it runs already: see $logs/$1"
  # shellcheck disable=SC2016 # the inner shell expands them
  run bash -c 'setsid "${@:3}" >>"$1/$2" 2>&1 </dev/null & echo $! >"$1/pid"' bash "$logs" "$@"
}
is_running() { [[ -f $logs/pid ]] && kill -0 "$(<"$logs/pid")" 2>/dev/null; }

# note TEXT: for who has started something.
note() { [[ -n $dry_run ]] || echo "$*"; }

# The file of CONFIG, which is a name or a path, with or without a schedule.
recipe_file() {
  local file=${CONFIG%:*}
  [[ $file == *.py ]] && echo "$file" || echo "configs/$file.py"
}

# What is copied, or built into an image, is a commit with the config in it.
committed() {
  [[ -z $(git status --porcelain) ]] || die "there are changes that are not committed; other hosts get the commit"
  git cat-file -e "HEAD:./$(recipe_file)" 2>/dev/null || die "CONFIG $CONFIG is not in the commit that other hosts get"
}

# shared_workdir [gs]: all hosts see the workdir, and read there what the first of them, which alone writes, compiled.
# https://docs.jax.dev/en/latest/persistent_compilation_cache.html
shared_workdir() {
  [[ ${1-} != gs || $WORKDIR == gs://* ]] || die "WORKDIR $WORKDIR: expected gs://bucket/folder; it outlives the hosts"
  [[ $WORKDIR =~ ^(gs://[^/]+)?/. ]] || die "WORKDIR $WORKDIR: expected gs://bucket/folder or /a/shared/folder"
  [[ ! $WORKDIR =~ ^/(tmp|dev|root)/ ]] || die "WORKDIR $WORKDIR: other hosts do not see that folder"
  export JAX_COMPILATION_CACHE_DIR=$WORKDIR/compiled
}

need WORKDIR "the folder of the run, such as gs://bucket/r50"
WORKDIR=${WORKDIR%/}
NAME=${NAME:-$(basename "$WORKDIR" | tr 'A-Z_.' 'a-z--')}
[[ $NAME =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] || die "NAME $NAME: expected up to 40 of a-z, 0-9, -, a letter first"
logs=runs/launch/$NAME
if [[ $action == start ]]; then
  need CONFIG "a recipe, such as conditional_detr_r50"
  [[ -f $(recipe_file) ]] || die "there is no config $CONFIG in $PWD"
fi
[[ -n $dry_run ]] || mkdir -p "$logs"
# shellcheck disable=SC2034 # for the launchers
train=(cdetr train "--config=${CONFIG-}" "--workdir=$WORKDIR" "${fields[@]}")
