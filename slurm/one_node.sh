#!/bin/bash
# Train one run, and resume it after preemption, time limits and lost nodes. Created by:
# kempnerforge submit configs/quickstart.toml --nodes 1 --gpus-per-node 2 --cpus-per-task 8 --time 2:00:00
#SBATCH --job-name=quickstart
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=2
#SBATCH --cpus-per-task=8
#SBATCH --time=2:00:00
#SBATCH --output=runs/quickstart/slurm/%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
# -- values ----------------------------------------------------------------------------------------------
processes_per_node=2
train=(configs/quickstart.toml)
# --------------------------------------------------------------------------------------------------------

# Check the configuration, record environment, git revision and config in the run's folder, print its path.
run_dir=$(kempnerforge slurm begin --processes-per-node "$processes_per_node" -- "${train[@]}") || exit
rm -f "$run_dir/stop.request" # of an earlier attempt

# The handlers only request a stop. What to do next is decided after training has ended. Only this shell gets
# SIGUSR1, so forward it: srun passes it to the launcher on every node, and the launcher to its ranks. SLURM
# itself sends SIGTERM to all processes, and a second SIGTERM would interrupt the shutdown that the first started.
srun=
trap 'echo SIGTERM >"$run_dir/stop.request"' TERM
trap 'echo SIGUSR1 >"$run_dir/stop.request"; kill -s USR1 "$srun"' USR1

# srun does not inherit --cpus-per-task from sbatch. The launcher restarts ranks in place after a fault; faults
# that all name one node are left to a requeue without that node.
[[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
# A key for the messages between the launchers on the nodes, which other users cannot know.
KEMPNERFORGE_LINK_SECRET=$(od -An -N32 -w32 -tx8 /dev/urandom) || exit
export KEMPNERFORGE_LINK_SECRET
export KEMPNERFORGE_REQUEUE=1
srun --kill-on-bad-exit=0 kempnerforge train --processes "$processes_per_node" "${train[@]}" &
srun=$!
# A trap interrupts wait, so wait again. A foreground srun would delay the traps until it ends.
while kill -0 "$srun" 2>/dev/null; do wait "$srun"; done
trap '' TERM USR1 # training has ended, and requeueing sends SIGTERM

# Requeue the job if the run is not finished and nobody cancelled it. Otherwise exit with the run's status.
kempnerforge slurm after "$run_dir"
