#!/bin/bash
# Trains one run, and goes on with it after preemption, time limits and lost nodes. Made by:
# kempnerforge submit configs/llama_7b.toml --nodes 4 --gpus-per-node 8 --time 24:00:00
#SBATCH --job-name=llama-7b
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --output=runs/llama-7b/slurm/%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
# -- values ----------------------------------------------------------------------------------------------
processes_per_node=8
train=(scripts/train.py --config configs/llama_7b.toml)
# How long torchrun lets ranks save after a signal; they end themselves before, after train.shutdown_timeout_s.
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

# Handlers ask for a stop and return; what follows is decided when training has ended. SIGUSR1 comes to this shell
# alone, so it is handed on: by srun to every torchrun, and by that to its ranks. SIGTERM is sent to all of them by
# SLURM itself, and a second one would cut short what the first began.
srun=
trap 'echo SIGTERM >"$run_dir/stop.request"' TERM
trap 'echo SIGUSR1 >"$run_dir/stop.request"; kill -s USR1 "$srun"' USR1

srun --kill-on-bad-exit=0 torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "$processes_per_node" \
    --rdzv-backend c10d --rdzv-endpoint "$address:$port" --rdzv-id "$SLURM_JOB_ID-$restart" \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 "${train[@]}" &
srun=$!
# A trap interrupts wait, so wait again. A foreground srun would put the traps off until it ends.
while kill -0 "$srun" 2>/dev/null; do wait "$srun"; done
trap '' TERM USR1 # nothing is left to stop, and requeueing sends SIGTERM

# Puts the job back into the queue exactly when work is left and nobody cancelled it; else this is the job's status.
kempnerforge slurm after "$run_dir"
