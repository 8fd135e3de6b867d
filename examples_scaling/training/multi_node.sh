#!/usr/bin/env bash
# Any training script on several nodes. The repository, data and RUN_DIR must be on a file system that all nodes see.
#   SLURM:     sbatch --nodes 4 --gpus-per-node 8 examples_scaling/training/multi_node.sh training/mdm/2298m_tp2_pp2.sh
#   hostfile:  HOSTFILE=hosts.txt bash examples_scaling/training/multi_node.sh training/mdm/2298m_tp2_pp2.sh
#              (DeepSpeed's format, "host slots=8" a line; needs passwordless ssh)
# Submit from the repository. To end before a time limit and continue with the next job: EXIT_DURATION_IN_MINS=1430.
#SBATCH --job-name=megatron
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --output=%x-%j.log
set -euo pipefail
# sbatch runs a copy of this file from its spool folder, so the repository is where the job was submitted.
if [ -n "${SLURM_JOB_ID:-}" ]; then EXAMPLES="$SLURM_SUBMIT_DIR/examples_scaling"
else EXAMPLES="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"; fi
case " $* " in *" --help "*|*" -h "*) sed -n '2,/^#SBATCH/{/^#SBATCH/d; s/^# \{0,1\}//p;}' "$0"; exit 0 ;; esac
SCRIPT="$EXAMPLES/${1:?which training script? for instance training/mdm/140m_100M.sh}"; shift
[ -f "$SCRIPT" ] || { echo "error: no file $SCRIPT; scripts are named from examples_scaling/; see ls $EXAMPLES/training/*" >&2; exit 2; }

if [ -n "${SLURM_JOB_ID:-}" ]; then   # srun does not inherit sbatch's --cpus-per-task, and gives one core without it
  exec srun --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-$(nproc)}}" --kill-on-bad-exit=1 bash "$SCRIPT" "$@"
fi
[ -n "${HOSTFILE:-}" ] || { echo "error: neither a SLURM job nor HOSTFILE; several nodes need one of them; see the head of $0" >&2; exit 2; }
exec bash "$SCRIPT" "$@"
