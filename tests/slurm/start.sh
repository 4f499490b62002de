#!/bin/bash
# Start a Slurm of two nodes on this machine, as root, with all its files in the folder $1 (export SLURM_CONF=$1/slurm.conf
# to use it); `stop.sh`, which it writes there, ends what was started. Needs Debian's slurm-wlm and munge.
set -euo pipefail
dir=$(realpath "$1")
mkdir -p "$dir"/{state,spool_n1,spool_n2}
echo "set +e" > "$dir/stop.sh"

if ! munge -n > /dev/null 2>&1; then
    mkdir -p /run/munge
    chown munge: /run/munge
    runuser -u munge -- munged --pid-file=/run/munge/munged.pid
    echo "kill $(cat /run/munge/munged.pid)" >> "$dir/stop.sh"
fi

cat > "$dir/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$(hostname)(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmctldPort=16817
ReturnToService=2
KillWait=5
SlurmdParameters=config_overrides
GresTypes=gpu
StateSaveLocation=$dir/state
SlurmctldPidFile=$dir/slurmctld.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdPidFile=$dir/slurmd_%n.pid
SlurmdSpoolDir=$dir/spool_%n
SlurmdLogFile=$dir/slurmd_%n.log
NodeName=n1 NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=16821 CPUs=4 RealMemory=8000 Gres=gpu:2
NodeName=n2 NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=16822 CPUs=4 RealMemory=8000 Gres=gpu:2
PartitionName=debug Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
CONF
# Devices that are no GPUs, but are handed out like them.
mknod "$dir/gpu0" c 1 3
mknod "$dir/gpu1" c 1 3
echo "NodeName=n[1-2] Name=gpu File=$dir/gpu[0-1]" > "$dir/gres.conf"
export SLURM_CONF=$dir/slurm.conf
slurmctld -f "$SLURM_CONF"
slurmd -f "$SLURM_CONF" -N n1
slurmd -f "$SLURM_CONF" -N n2
for _ in $(seq 50); do
    if [ "$(sinfo --noheader --states=idle --format=%D 2> /dev/null)" = 2 ]; then break; fi
    sleep 0.2
done
echo "kill \$(cat $dir/slurmd_n1.pid $dir/slurmd_n2.pid $dir/slurmctld.pid)" >> "$dir/stop.sh"
sinfo
