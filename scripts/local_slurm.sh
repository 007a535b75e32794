#!/usr/bin/env bash
# A real SLURM on this machine alone: two nodes, n1 and n2, each with a slurmd of its own. For trying scripts/slurm/ and
# for the tests (tests/behaviour/tests/slurm.rs). Needs root, as in a container; no systemd. Not for production.
#
#   eval "$(scripts/local_slurm.sh start)"     installs Debian's packages where missing, starts, prints SLURM_CONF
#   eval "$(scripts/local_slurm.sh status)"    the same where it runs, else fails
#   scripts/local_slurm.sh stop
#
# Everything is in one folder (FSDP_LOCAL_SLURM, default /tmp/fsdp-local-slurm), but for two names in /etc/hosts, so that
# ranks find "n1". CPUS_PER_NODE sets how many tasks a node takes (default 8); the cores are shared all the same.
set -euo pipefail

dir=${FSDP_LOCAL_SLURM:-/tmp/fsdp-local-slurm}
cpus=${CPUS_PER_NODE:-8}
host=$(hostname -s)
export SLURM_CONF=$dir/slurm.conf

say() { printf 'local_slurm: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

# A process that nobody has reaped yet lives no more.
lives() { [ -r "/proc/$1/status" ] && ! grep -q '^State:.Z' "/proc/$1/status"; }

is_running() { [ -f "$dir/$1.pid" ] && lives "$(cat "$dir/$1.pid")"; }

stop() {
    if is_running slurmctld; then
        # Jobs would outlive the daemons.
        scancel --signal=KILL --full --partition=all 2>/dev/null || true
        scancel --partition=all 2>/dev/null || true
        for _ in $(seq 100); do [ -n "$(squeue -h 2>/dev/null)" ] || break; sleep 0.1; done
    fi
    for daemon in slurmd-n1 slurmd-n2 slurmctld munged; do
        [ -f "$dir/$daemon.pid" ] || continue
        pid=$(cat "$dir/$daemon.pid")
        # slurmctld takes seconds to save a state that nobody needs.
        [ $daemon = slurmctld ] && signal=KILL || signal=TERM
        kill -$signal "$pid" 2>/dev/null || true
        for _ in $(seq 100); do lives "$pid" || break; sleep 0.05; done
        rm -f "$dir/$daemon.pid"
    done
    # /etc/hosts is a mount point in containers: rewritten in place, not replaced.
    if grep -q '# local_slurm$' /etc/hosts; then
        hosts=$(grep -v '# local_slurm$' /etc/hosts)
        printf '%s\n' "$hosts" > /etc/hosts
    fi
}

# Nodes in one of these states, such as "idle,mixed".
num_nodes() { sinfo -h -t "$1" -o %D 2>/dev/null | awk '{ n += $1 } END { print n + 0 }'; }

# A cluster with jobs on its nodes is up too. Asked without a controller, sinfo waits long.
is_up() {
    for daemon in munged slurmctld slurmd-n1 slurmd-n2; do is_running $daemon || return 1; done
    [ "$(num_nodes idle,mixed,allocated,completing)" = 2 ]
}

install_packages() {
    for program in munged slurmctld slurmd srun; do
        command -v $program >/dev/null && continue
        command -v apt-get >/dev/null || die "$program is missing, and only Debian's packages are installed by this script"
        say "installing slurm-wlm and munge"
        apt-get update -qq >&2
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq slurm-wlm munge libpmix2 >&2
        return
    done
}

start() {
    [ "$(id -u)" = 0 ] || die "needs root: slurmd starts tasks as other users"
    install_packages
    if is_up; then return; fi
    stop
    [ ! -e "$dir" ] || [ -f "$dir/made_by_local_slurm" ] || die "$dir exists and is not of this script; choose another FSDP_LOCAL_SLURM"
    rm -rf "$dir"
    mkdir -p "$dir"
    touch "$dir/made_by_local_slurm"
    mkdir "$dir"/{state,n1,n2,munge,tmp-n1,tmp-n2}
    chmod 755 "$dir" "$dir/munge"
    # Tasks of other users write there.
    chmod 1777 "$dir"/tmp-n?
    head -c 128 /dev/urandom > "$dir/munge/key"
    chmod 600 "$dir/munge/key"
    # A munged of our own: another one on this machine is left alone. SLURM finds it by AuthInfo.
    munged --force --socket="$dir/munge/socket" --key-file="$dir/munge/key" --pid-file="$dir/munged.pid" \
        --log-file="$dir/munged.log" --seed-file="$dir/munge/seed"
    # Open MPI names its shared memory by host and local rank, which are not enough where one host is two nodes.
    cat > "$dir/task_prolog" <<PROLOG
#!/bin/sh
echo "export OMPI_MCA_btl_vader_backing_directory=$dir/tmp-\$SLURMD_NODENAME"
PROLOG
    chmod 755 "$dir/task_prolog"
    # TmpFS: the PMIx plugin makes a folder there for each step, and both nodes are one machine. cred_expire: a requeued
    # job waits so long before it starts again, 120 s by default.
    cat > "$SLURM_CONF" <<CONF
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=16817
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$dir/munge/socket,cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/%n
TmpFS=$dir/tmp-%n
TaskProlog=$dir/task_prolog
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd-%n.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd-%n.log
SwitchType=switch/none
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SlurmdParameters=config_overrides
SchedulerParameters=requeue_delay=1,sched_interval=1
JobCompType=jobcomp/none
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=16818 CPUs=$cpus State=UNKNOWN
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=16819 CPUs=$cpus State=UNKNOWN
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE OverSubscribe=YES State=UP
CONF
    echo '127.0.0.1 n1 n2 # local_slurm' >> /etc/hosts
    slurmctld -c -f "$SLURM_CONF" >&2
    slurmd -c -f "$SLURM_CONF" -N n1 >&2
    slurmd -c -f "$SLURM_CONF" -N n2 >&2
    for _ in $(seq 120); do
        [ "$(num_nodes idle)" = 2 ] && return
        sleep 0.25
    done
    die "the nodes did not become idle; see $dir/*.log"
}

case ${1:-} in
start) start && echo "export SLURM_CONF=$SLURM_CONF" ;;
status) is_up && echo "export SLURM_CONF=$SLURM_CONF" ;;
stop) stop ;;
*) sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
