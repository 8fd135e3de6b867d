#!/usr/bin/env bash
# Any training script on several nodes: as a SLURM job that saves before its end and queues itself again until the run is
# done, or on the hosts of a file. Repository, data and RUN_DIR must be on a file system that all nodes see.
#   SLURM:     sbatch --nodes 4 --gpus-per-node 8 --time 8:00:00 examples_scaling/training/multi_node.sh training/mdm/2298m_tp2_pp2.sh
#              (SBATCH_ACCOUNT and SBATCH_PARTITION, or sbatch's flags, say where; all its flags go before the script)
#   hostfile:  HOSTFILE=hosts.txt bash examples_scaling/training/multi_node.sh training/mdm/2298m_tp2_pp2.sh
#              ("host slots=8" a line; needs pdsh and ssh without password)
# A job appends to one log, megatron-JOB.log where it was submitted; RUN_DIR/logs has that of every process. scancel JOB
# saves and ends; scancel --batch --signal=USR1 JOB saves and queues it again. Environment variables of a job:
#   SETUP=FILE       sourced first: module load, NCCL_SOCKET_IFNAME
#   CONTAINER=WORDS  "--container-image=image.sqsh --container-mounts=/data" (pyxis), or "apptainer exec --nv image.sif"
#   STOP_MINUTES=10  to stop before the end of the job
#SBATCH --job-name=megatron --output=%x-%j.log --open-mode=append --requeue --signal=B:USR1@120
#SBATCH --ntasks-per-node=1 --exclusive --mem=0
set -euo pipefail
EXAMPLES="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [ ! -f "$EXAMPLES/common.sh" ]; then   # sbatch runs a copy from its spool folder
  EXAMPLES="$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=\(.*/examples_scaling\)/.*|\1|p')" || EXAMPLES=""
  : "${EXAMPLES:=$SLURM_SUBMIT_DIR/examples_scaling}"
fi
# shellcheck source=../common.sh
source "$EXAMPLES/common.sh"
SCRIPT="$EXAMPLES/${1:-}"; SCRIPT="${SCRIPT/"$EXAMPLES/examples_scaling/"/"$EXAMPLES/"}"
[ -f "$SCRIPT" ] || die "training script ${1:-not named}" "it is named from examples_scaling/" "for instance training/mdm/140m_100M.sh"
shift
if [ -n "${SLURM_JOB_ID:-}" ]; then run_on_nodes bash "$SCRIPT" "$@"; exit; fi
idle "only a SLURM job reads it" SETUP CONTAINER STOP_MINUTES
[ -n "$HOSTFILE" ] || [ "$DRY_RUN" = 1 ] || die "neither a SLURM job nor HOSTFILE" "several nodes need one of them" "see --help"
exec bash "$SCRIPT" "$@"
