#!/usr/bin/env bash
# Throw-away Slurm (munged + slurmctld + N x slurmd) under one directory; needs root, no systemd, no cgroups.
#   eval "$(slurm_sandbox.sh up [NODES])"    start; prints  export SLURM_CONF=... SLURM_SANDBOX=...
#   slurm_sandbox.sh down                    cancel jobs, stop the daemons it started, delete the directory
#   slurm_sandbox.sh run [NODES] -- CMD...   up, run CMD with SLURM_CONF set, always down; exit status of CMD
# Nothing is written outside $SLURM_SANDBOX (default: mktemp -d /tmp/slurm-sandbox.XXXXXX).
set -euo pipefail

die() { echo "slurm_sandbox: $*" >&2; exit 1; }
free_ports() { python3 - "$1" <<'P'
import socket, sys
s = [socket.socket() for _ in range(int(sys.argv[1]))]
for x in s: x.bind(("127.0.0.1", 0))
print(*[x.getsockname()[1] for x in s])
P
}
alive() {  # alive PID NAME: still that daemon, and not a zombie nobody reaps (container without an init)
  [ "$(cat "/proc/$1/comm" 2>/dev/null)" = "$2" ] && ! grep -q '^State:[[:space:]]*Z' "/proc/$1/status" 2>/dev/null
}
stop_pidfiles() {  # stop_pidfiles NAME=PIDFILE...: TERM them all, wait at most 10 s, then KILL; only processes we started
  local a pid i live
  local -a ps=()
  for a in "$@"; do
    pid=$(cat "${a#*=}" 2>/dev/null) || continue
    alive "$pid" "${a%%=*}" && kill "$pid" 2>/dev/null && ps+=("${a%%=*}=$pid")
  done
  for ((i = 0; i < 200; i++)); do
    live=0; for a in "${ps[@]}"; do alive "${a#*=}" "${a%%=*}" && live=1; done
    [ $live = 0 ] && return 0
    sleep 0.05
  done
  for a in "${ps[@]}"; do alive "${a#*=}" "${a%%=*}" && kill -9 "${a#*=}"; done
  return 0
}

up() {
  local nodes=${1:-1} S host cpus mem ports t0 i n
  [ "$(id -u)" = 0 ] || die "must run as root"
  for b in munged slurmctld slurmd sbatch; do
    command -v $b >/dev/null || die "$b missing: apt-get install --no-install-recommends slurmctld slurmd slurm-client munge"
  done
  S=${SLURM_SANDBOX:-$(mktemp -d /tmp/slurm-sandbox.XXXXXX)}; SLURM_SANDBOX=$S
  mkdir -p "$S"; chmod 755 "$S"
  [ ! -e "$S/slurm.conf" ] || die "$S is already in use: run down first"
  trap '[ $? = 0 ] || down' EXIT                      # a start that fails half-way leaves nothing running
  mkdir -p "$S"/{munge,state,log}; chmod 755 "$S/munge"
  host=$(hostname -s); cpus=${SANDBOX_CPUS:-$(nproc)}
  mem=$(awk '/MemTotal/{print int($2/1024*0.9)}' /proc/meminfo)
  read -r -a ports <<<"$(free_ports $((nodes + 1)))"

  ( umask 077; head -c 1024 /dev/urandom > "$S/munge/munge.key" )
  munged --key-file="$S/munge/munge.key" --socket="$S/munge/sock" --pid-file="$S/munge/munged.pid" \
         --log-file="$S/log/munged.log" --seed-file="$S/munge/seed" --num-threads=2 2>>"$S/log/munged.err" \
    || { cat "$S/log/munged.err" >&2; die "munged did not start"; }

  { cat <<C
ClusterName=sandbox
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=${ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$S/munge/sock,cred_expire=5
CredType=cred/munge
StateSaveLocation=$S/state
SlurmdSpoolDir=$S/spool-%n
SlurmctldPidFile=$S/slurmctld.pid
SlurmdPidFile=$S/slurmd-%n.pid
SlurmctldLogFile=$S/log/slurmctld.log
SlurmdLogFile=$S/log/slurmd-%n.log
SlurmctldDebug=info
SlurmdDebug=info
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$S/log/jobcomp.txt
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=60
KillWait=5
MinJobAge=3600
MailProg=/bin/true
GresTypes=gpu
C
    for ((i = 0; i < nodes; i++)); do
      n=$host; [ "$nodes" -gt 1 ] && n=n$i
      echo "NodeName=$n NodeHostname=$host NodeAddr=127.0.0.1 Port=${ports[$((i + 1))]} CPUs=$cpus RealMemory=$((mem / nodes)) Gres=${SANDBOX_GRES:-gpu:0} State=UNKNOWN"
    done
    echo "PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE OverSubscribe=NO State=UP"
  } > "$S/slurm.conf"
  printf 'CgroupPlugin=cgroup/v1\n' > "$S/cgroup.conf"
  case ${SANDBOX_GRES:-gpu:0} in gpu:0) : > "$S/gres.conf";; *) n=${SANDBOX_GRES#gpu:}; for ((i = 0; i < n; i++)); do : > "$S/nvidia$i"; done
                            echo "Name=gpu File=$S/nvidia[0-$((n - 1))] Flags=nvidia_gpu_env" > "$S/gres.conf";; esac

  export SLURM_CONF=$S/slurm.conf
  slurmctld -f "$SLURM_CONF" >>"$S/log/start.log" 2>&1 || { cat "$S/log/start.log" "$S/log/slurmctld.log" >&2; die "slurmctld did not start"; }
  for ((i = 0; i < nodes; i++)); do
    n=$host; [ "$nodes" -gt 1 ] && n=n$i
    mkdir -p "$S/spool-$n"
    slurmd -N "$n" -f "$SLURM_CONF" >>"$S/log/start.log" 2>&1 || { cat "$S/log/start.log" >&2; die "slurmd $n did not start"; }
  done
  t0=$SECONDS
  until [ "$(sinfo -h -o '%D %t' 2>/dev/null)" = "$nodes idle" ]; do
    [ $((SECONDS - t0)) -lt 30 ] || { sinfo -Nel >&2 || true; tail -n 20 "$S"/log/*.log >&2; die "not ready after 30 s"; }
    sleep 0.1
  done
  trap - EXIT
  echo "export SLURM_CONF=$S/slurm.conf SLURM_SANDBOX=$S"
}

down() {
  local S=${SLURM_SANDBOX:?SLURM_SANDBOX is not set} f i
  [ -d "$S/munge" ] || return 0
  export SLURM_CONF=$S/slurm.conf
  if [ -e "$S/slurmctld.pid" ] && scontrol ping >/dev/null 2>&1; then
    scancel -u root 2>/dev/null || true
    for ((i = 0; i < 200; i++)); do [ -z "$(squeue -h -t R,CG,S,CF 2>/dev/null)" ] && break; sleep 0.05; done
  fi
  local -a a=("slurmctld=$S/slurmctld.pid" "munged=$S/munge/munged.pid")
  for f in "$S"/slurmd-*.pid; do [ -e "$f" ] && a=("slurmd=$f" "${a[@]}"); done
  stop_pidfiles "${a[@]}"
  rm -rf "$S"
}

case ${1:-} in
  up) shift; up "$@" ;;
  down) down ;;
  run) shift; nodes=1; [ "$1" = -- ] || { nodes=$1; shift; }; shift
       export SLURM_SANDBOX=${SLURM_SANDBOX:-$(mktemp -d /tmp/slurm-sandbox.XXXXXX)}
       up "$nodes" >/dev/null; trap down EXIT; "$@" ;;
  *) sed -n '2,7p' "$0"; exit 2 ;;
esac
