#!/bin/bash
# Train one run, and resume it after preemption, time limits and lost nodes. Created by:
# kempnerforge submit configs/quickstart.toml --nodes 1 --gpus-per-node 2 --time 2:00:00
#SBATCH --job-name=quickstart
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=2
#SBATCH --time=2:00:00
#SBATCH --output=runs/quickstart/slurm/%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
# -- values ----------------------------------------------------------------------------------------------
processes_per_node=2
train=(scripts/train.py --config configs/quickstart.toml)
# How long torchrun waits for ranks that save after a signal. The ranks exit earlier, after
# train.shutdown_timeout_s.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600
# --------------------------------------------------------------------------------------------------------

restart=${SLURM_RESTART_COUNT:-0}
# Check the configuration, record environment, git revision and config in the run's folder, print its path.
run_dir=$(kempnerforge slurm begin --processes-per-node "$processes_per_node" -- "${train[@]:1}") || exit
rm -f "$run_dir/stop.request" # of an earlier attempt

# The address by which SLURM itself reaches the first node. Port and id differ for every start, so that
# lingering ranks of an earlier start cannot join.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(scontrol -o show node "$first" | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2)
port=$((20000 + (SLURM_JOB_ID * 7 + restart) % 12000))

# The handlers only request a stop. What to do next is decided after training has ended. Only this shell gets
# SIGUSR1, so forward it: srun passes it to every torchrun, and torchrun to its ranks. SLURM itself sends SIGTERM
# to all processes, and a second SIGTERM would interrupt the shutdown that the first one started.
srun=
trap 'echo SIGTERM >"$run_dir/stop.request"' TERM
trap 'echo SIGUSR1 >"$run_dir/stop.request"; kill -s USR1 "$srun"' USR1

srun --kill-on-bad-exit=0 torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "$processes_per_node" \
    --rdzv-backend c10d --rdzv-endpoint "$address:$port" --rdzv-id "$SLURM_JOB_ID-$restart" \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 "${train[@]}" &
srun=$!
# A trap interrupts wait, so wait again. A foreground srun would delay the traps until it ends.
while kill -0 "$srun" 2>/dev/null; do wait "$srun"; done
trap '' TERM USR1 # training has ended, and requeueing sends SIGTERM

# Requeue the job if the run is not finished and nobody cancelled it. Otherwise exit with the run's status.
kempnerforge slurm after "$run_dir"
