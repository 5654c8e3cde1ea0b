#!/bin/bash
# Train inside an existing allocation. Ctrl-C saves and stops. Nothing is requeued. Example:
# salloc --nodes 2 --ntasks-per-node 1 --gpus-per-node 8 --time 2:00:00 bash slurm/interactive.sh
# -- values ----------------------------------------------------------------------------------------------
processes_per_node=8
train=(configs/llama_7b.toml --distributed.dp_replicate=2)
# --------------------------------------------------------------------------------------------------------

run_dir=$(kempnerforge slurm begin --processes-per-node "$processes_per_node" -- "${train[@]}") || exit
rm -f "$run_dir/stop.request" # of an earlier attempt

[[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
# A key for the messages between the launchers on the nodes, which other users cannot know.
KEMPNERFORGE_LINK_SECRET=$(od -An -N32 -w32 -tx8 /dev/urandom) || exit
export KEMPNERFORGE_LINK_SECRET
srun=
# Run srun in the background: it would treat Ctrl-C in the terminal as a request to kill.
trap 'echo SIGINT >"$run_dir/stop.request"; kill -s USR1 "$srun"' INT TERM HUP
set -m
srun --ntasks-per-node 1 kempnerforge train --processes "$processes_per_node" "${train[@]}" &
srun=$!
while kill -0 "$srun" 2>/dev/null; do wait "$srun"; done
