#!/usr/bin/env bash
# torchrun whose ranks may take their time to stop: same arguments, same exit code.
#
# torchrun itself, told to stop, kills its ranks 30 seconds later, which is not enough to finish the step of a large model
# and save it. This passes SIGTERM and SIGUSR1 on to the ranks as SIGUSR1 and lets torchrun wait for them. On Slurm, where a
# signal reaches every process of a job, torchrun too: ask for SIGUSR1, which it is made to ignore here.
set -uo pipefail

pass_on() {
    local ranks
    read -r -a ranks 2>/dev/null <"/proc/$torchrun/task/$torchrun/children"
    [ ${#ranks[@]} -eq 0 ] || kill -USR1 "${ranks[@]}" 2>/dev/null
}

trap '' USR1 # inherited by torchrun; a rank listens as soon as it has something to save
torchrun "$@" &
torchrun=$!
trap 'interrupted=1; pass_on' USR1 TERM
trap 'interrupted=1' INT # Ctrl-C reaches torchrun by itself

code=127 # what `wait` says of a process that it has waited for already
while :; do
    interrupted=
    wait "$torchrun"
    last=$?
    [ "$last" -eq 127 ] || code=$last
    [ -n "$interrupted" ] || exit "$code" # a signal ends `wait` before torchrun has ended
done
