# shellcheck shell=bash
# Sourced by common.sh: what starts a program on every process of this machine, of the hosts of a file, or of a SLURM job.

# DeepSpeed runs on this one node, without a word, where it finds no file or no host in it.
check_hostfile() {
  local line hosts=" " host slots number=0; WORLD=0 HOSTS=0
  [ -f "$HOSTFILE" ] || die "HOSTFILE=$HOSTFILE" "it names a file" "check the name"
  while IFS= read -r line || [ -n "$line" ]; do
    number=$((number + 1)) line="${line%%#*}"
    [[ "$line" =~ [^[:space:]] ]] || continue
    [[ "$line" =~ ^[[:space:]]*([^[:space:]=]+)[[:space:]]+slots=([0-9]+)[[:space:]]*$ ]] || die "$HOSTFILE, line $number: $line" \
      "a line is: host slots=8" "mend the line"
    host="${BASH_REMATCH[1]}" slots="${BASH_REMATCH[2]}"
    [ "$((10#$slots))" -gt 0 ] || die "$HOSTFILE, line $number: $line" "a host has at least one slot" "mend or remove the line"
    case "$hosts" in *" $host "*) die "$HOSTFILE, line $number: $host again" "a host has one line" "remove one of them" ;; esac
    hosts="$hosts$host " WORLD=$((WORLD + 10#$slots)) HOSTS=$((HOSTS + 1))
  done <"$HOSTFILE"
  [ "$HOSTS" -gt 0 ] || die "$HOSTFILE names no host" "a line is: host slots=8" "fill it in"
  [ "$NNODES" = "$HOSTS" ] || refuse "with HOSTFILE=$HOSTFILE" "it has $HOSTS hosts" "unset one of them" NNODES
  [ $((GPUS_PER_NODE * HOSTS)) = "$WORLD" ] || refuse "with HOSTFILE=$HOSTFILE" "it has $WORLD slots on $HOSTS hosts" \
    "unset one of them" GPUS_PER_NODE
  [ "$HOSTS" = 1 ] || [ "$DRY_RUN" = 1 ] || command -v pdsh >/dev/null || die "$HOSTFILE names several hosts, and there is no pdsh" \
    "deepspeed reaches them through pdsh and ssh" "install pdsh (apt-get install pdsh; conda install -c conda-forge pdsh)"
}

# Fills LAUNCH with what starts one program on all processes, python, torchrun or deepspeed, and WORLD with their number.
choose_launcher() {
  if [ "${SLURM_STEP_NUM_NODES:-1}" -gt 1 ]; then   # one task a node, started by srun
    refuse "in a SLURM job" "its nodes are those of the job" "unset it, and pass sbatch --nodes" HOSTFILE
    [ "$NNODES" = "$SLURM_STEP_NUM_NODES" ] || refuse "in a step of $SLURM_STEP_NUM_NODES nodes" \
      "its nodes are those of the job" "unset it, and pass sbatch --nodes" NNODES
    NNODES="$SLURM_STEP_NUM_NODES" NODE_RANK="$SLURM_NODEID"
    if [ "$MASTER_ADDR" = localhost ]; then   # not from multi_node.sh, which says it, because a container has no scontrol
      MASTER_ADDR="$(scontrol show hostnames "$SLURM_STEP_NODELIST")"
      MASTER_ADDR="${MASTER_ADDR%%$'\n'*}"   # the first; head would end scontrol, and with it this script
    fi
  fi
  [[ "$GPUS_PER_NODE $NNODES" =~ ^[1-9][0-9]*\ [1-9][0-9]*$ ]] || die "GPUS_PER_NODE=$GPUS_PER_NODE NNODES=$NNODES" \
    "both are whole numbers from 1" "mend or unset them"
  [[ "$NODE_RANK" =~ ^(0|[1-9][0-9]*)$ && "$NODE_RANK" -lt "$NNODES" ]] || die "NODE_RANK=$NODE_RANK with NNODES=$NNODES" \
    "nodes count from 0" "mend or unset one of them"
  WORLD=$((GPUS_PER_NODE * NNODES))
  if [ "$LAUNCHER" = auto ]; then
    if [ -n "$HOSTFILE" ]; then LAUNCHER=deepspeed; elif [ "$WORLD" -gt 1 ]; then LAUNCHER=torchrun; else LAUNCHER=python; fi
  fi
  [ -z "$HOSTFILE" ] || [ "$LAUNCHER" = deepspeed ] || die "HOSTFILE=$HOSTFILE with LAUNCHER=$LAUNCHER" \
    "only deepspeed reads a host file" "unset one of them"
  [ "$NNODES" -le 1 ] || [ "$LAUNCHER" = torchrun ] || [ -n "$HOSTFILE" ] || die "NNODES=$NNODES with LAUNCHER=$LAUNCHER" \
    "python runs on one node, deepspeed on those of HOSTFILE" "unset LAUNCHER"
  [ "$LAUNCHER" != python ] || [ "$GPUS_PER_NODE" = 1 ] || refuse "with LAUNCHER=python" \
    "python starts one process" "unset one of them" GPUS_PER_NODE
  [ "$LAUNCHER" = torchrun ] || idle "only torchrun keeps a log of each process" RANK_LOGS
  [ "$NNODES" -gt 1 ] || [ -n "${SLURM_JOB_ID:-}" ] || idle "it is for several nodes without HOSTFILE" MASTER_ADDR
  case "$LAUNCHER" in
    python) LAUNCH=("$ENV_PYTHON") WORLD=1 ;;
    torchrun)
      LAUNCH=("$ENV_PYTHON" "$REPO/tools/_torchrun.py" --nproc-per-node "$GPUS_PER_NODE")
      if [ "$NNODES" -gt 1 ]; then
        LAUNCH+=(--nnodes "$NNODES" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT")
      else LAUNCH+=(--standalone); fi
      if [ -n "$RANK_LOGS" ]; then keep_rank_logs; fi ;;
    deepspeed)
      LAUNCH=("$BIN/deepspeed" --master_port "$MASTER_PORT")
      if [ -n "$HOSTFILE" ]; then check_hostfile; LAUNCH+=(--hostfile "$HOSTFILE"); else LAUNCH+=(--num_gpus "$GPUS_PER_NODE"); fi ;;
    *) die "LAUNCHER=$LAUNCHER" "the launchers are auto, python, torchrun and deepspeed" "unset LAUNCHER to choose by the machine" ;;
  esac
}

# Every process's output in a file of its own besides the log, and after a collective that timed out what NCCL did last and
# the Python stacks: python -m torch.distributed.flight_recorder.fr_trace -p nccl_ RANK_LOGS
keep_rank_logs() {
  LAUNCH+=(--log-dir "$RANK_LOGS/node$NODE_RANK" --tee 3)
  # shellcheck disable=SC2016  # torchrun fills it in
  export TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE='[rank ${rank}] ' PYTHONFAULTHANDLER=1
  export TORCH_FR_BUFFER_SIZE=2000 TORCH_NCCL_DUMP_ON_TIMEOUT=1 TORCH_FR_DUMP_TEMP_FILE="$RANK_LOGS/nccl_"
  [ "$DRY_RUN" = 1 ] || mkdir -p "$RANK_LOGS/node$NODE_RANK"
}

# as_job COMMAND...: what a SLURM batch script ends with. A stop by USR1 (the job's --signal), or one whose time was up, queues the job
# again: same number, same log. After scancel it stays away, as it does after an error. SETUP: a file to source first.
as_job() {
  local status=0
  echo "== job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), $(date '+%F %T'), on" \
    "${SLURM_JOB_NODELIST:-}${EXIT_DURATION_IN_MINS:+, to stop after $EXIT_DURATION_IN_MINS minutes}"
  if [ -n "${SETUP:-}" ]; then
    [ -r "$SETUP" ] || die "SETUP=$SETUP" "it names a file to source" "check the name"
    set +eu   # module files are seldom written for these
    # shellcheck source=/dev/null
    source "$SETUP"
    set -eu
  fi
  DRY_RUN=0   # what a step does with --dry-run is for the step
  supervise "$@" || status=$?
  case "$STOPS $status" in
    *TERM*|*INT*|*HUP*) return "$status" ;;   # scancel
    *USR1*75|*USR1*130) ;;
    *USR1*) echo "status $status after the signal is no saved run (138: it came before the first step, so give a longer --time);" \
      "job $SLURM_JOB_ID is not queued again" >&2; return "$status" ;;
    *) [ "$status" = 75 ] && [ -n "${EXIT_DURATION_IN_MINS:-}" ] && [ "$SECONDS" -ge $((60 * 10#0${EXIT_DURATION_IN_MINS%.*})) ] || return "$status" ;;
  esac
  if scontrol requeue "$SLURM_JOB_ID"; then echo "job $SLURM_JOB_ID is queued again"
  else echo "SLURM does not queue job $SLURM_JOB_ID again: submit it again" >&2; fi
  return "$status"
}

# run_on_nodes COMMAND...: as_job with one process a node, which gets all CPUs that the job has there. It ends STOP_MINUTES before
# the job does, or after half of a job shorter than twice that; --signal comes later, should a step take long. CONTAINER: words
# before the command.
run_on_nodes() {
  local end="${SLURM_JOB_END_TIME:-}" seconds margin=$((60 * ${STOP_MINUTES:-10})) container
  read -r -a container <<<"${CONTAINER:-}"
  [ -n "$end" ] || end="$(date -d "$(squeue -h -j "$SLURM_JOB_ID" -o %e)" +%s 2>/dev/null)" || end=0   # without limit
  seconds=$((end - $(date +%s)))
  if [ "$seconds" -gt 0 ] && [ "$seconds" -lt 30000000 ]; then
    seconds=$((seconds > 2 * margin ? seconds - margin : seconds / 2))
    : "${EXIT_DURATION_IN_MINS:=$(awk "BEGIN { printf \"%.1f\", $seconds / 60 }")}"
  fi
  [ "$MASTER_ADDR" != localhost ] || MASTER_ADDR="$(hostname)"   # this script runs on the first node
  export EXIT_DURATION_IN_MINS MASTER_ADDR
  # shellcheck disable=SC2034  # read by supervise
  ASK=USR1   # srun hands it on to its tasks; at SIGTERM it kills them
  # srun takes neither sbatch's CPUs nor, after --export=NONE, its environment. A node that ends first must not end those that save.
  as_job srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --export=ALL --cpu-bind=none \
    --cpus-per-task="${SLURM_CPUS_ON_NODE:-$(nproc)}" --kill-on-bad-exit=0 --wait=300 ${container[@]+"${container[@]}"} "$@"
}
