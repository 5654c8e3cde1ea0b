#!/bin/bash
# Train inside an existing allocation. Ctrl-C saves and stops. Nothing is requeued. Example:
# salloc --nodes 2 --ntasks-per-node 1 --gpus-per-node 8 --time 2:00:00 bash slurm/interactive.sh
# -- values ----------------------------------------------------------------------------------------------
processes_per_node=8
train=(scripts/train.py --config configs/llama_7b.toml --distributed.dp_replicate=2)
# --------------------------------------------------------------------------------------------------------

run_dir=$(kempnerforge slurm begin --processes-per-node "$processes_per_node" -- "${train[@]:1}") || exit
rm -f "$run_dir/stop.request" # of an earlier attempt

# The address by which SLURM itself reaches the first node, and a port that no recent start has used.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(scontrol -o show node "$first" | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2)
port=$((20000 + (SLURM_JOB_ID * 7 + $$) % 12000))

srun=
# Run srun in the background: it would treat Ctrl-C in the terminal as a request to kill.
trap 'echo SIGINT >"$run_dir/stop.request"; kill -s USR1 "$srun"' INT TERM HUP
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600
set -m
srun --ntasks-per-node 1 torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "$processes_per_node" \
    --rdzv-backend c10d --rdzv-endpoint "$address:$port" --rdzv-id "$SLURM_JOB_ID-$$" \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 "${train[@]}" &
srun=$!
while kill -0 "$srun" 2>/dev/null; do wait "$srun"; done
