#!/bin/bash
# A training script on several machines under Slurm, from the folder of the repository:
#     sbatch training/accelerate/slurm.sh training/contrastive.py --recipe t-moco-v2-resnet50-imagenet --output_dir ...
#     ACCELERATE_CONFIG=training/accelerate/fsdp_8_bf16.yaml sbatch --nodes 2 training/accelerate/slurm.sh training/dae_dit.py ...
# On each machine one task starts accelerate, which starts a process per GPU; all meet on the first machine. A job that is
# put back into the queue goes on from its last checkpoint. Data, --output_dir and Python lie on storage that all see.
#SBATCH --job-name=hf_dpssl
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

config=${ACCELERATE_CONFIG:-training/accelerate/gpu_32_bf16.yaml}
per_machine=${SLURM_GPUS_PER_NODE##*:} # "8", or with the kind of GPU "h100:8"
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
script=$1
shift
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-64} # which srun does not take from sbatch

# SLURM_NODEID is another on each machine: expanded there, not here.
srun --kill-on-bad-exit=1 bash -c 'exec accelerate launch --rdzv_backend c10d --machine_rank "$SLURM_NODEID" "$@"' task \
    --config_file "$config" \
    --num_machines "$SLURM_JOB_NUM_NODES" \
    --num_processes $((SLURM_JOB_NUM_NODES * per_machine)) \
    --main_process_ip "$first" \
    --main_process_port $((20000 + SLURM_JOB_ID % 20000)) \
    "$script" --resume_from_checkpoint latest "$@"
