#!/bin/bash
# Trains one run, and goes on with it after preemption, time limits and lost nodes. Made by: @COMMAND@
@SBATCH@
# -- values ----------------------------------------------------------------------------------------------
@PATH@processes_per_node=@PROCESSES@
train=(@TRAIN@)
# How long torchrun lets a rank save after a signal; SLURM's own KillWait and GraceTime may be shorter.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600
# --------------------------------------------------------------------------------------------------------

restart=${SLURM_RESTART_COUNT:-0}
# Checks the configuration, prints the run's folder, and notes environment, git revision and config there.
run_dir=$(kempnerforge slurm begin --processes-per-node "$processes_per_node" -- "${train[@]:1}") || exit
rm -f "$run_dir/stop.request" # one of an earlier attempt

# The address by which SLURM itself reaches the first node. Port and id are new for every start, so that ranks
# of an earlier one that linger cannot join.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(scontrol -o show node "$first" | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2)
port=$((20000 + (SLURM_JOB_ID * 7 + restart) % 12000))

# Handlers ask for a stop and return; what follows is decided when training has ended.
stop() { # name of the signal
    [[ -n $srun ]] || return
    echo "$(date +%FT%T) $1: asking the run to save and stop"
    echo "$1" >"$run_dir/stop.request"
    kill -s "${1#SIG}" "$srun" # srun hands it to every torchrun, and that to its ranks
}
trap 'stop SIGUSR1' USR1
trap 'stop SIGTERM' TERM

srun --kill-on-bad-exit=0 torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "$processes_per_node" \
    --rdzv-backend c10d --rdzv-endpoint "$address:$port" --rdzv-id "$SLURM_JOB_ID-$restart" \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 "${train[@]}" &
srun=$!
# A trap interrupts wait, so wait again. A foreground srun would put the traps off until it ends.
while kill -0 "$srun" 2>/dev/null; do wait "$srun"; done
srun=

@AFTER@
