# The guest's process 1 after init.sh: makes the machine ready, runs /job/command, hands back its exit code and ends the machine. What goes wrong before that is on the console, and then there is no exit code.
# From the environment: KVXFER_VM (this folder), MODULES (of the kernel), TWO_HOSTS (1 or nothing).
set -e
mkdir -p /dev/shm /dev/pts /lib/modules
mount -t tmpfs -o mode=1777 none /dev/shm
mount -t devpts none /dev/pts
mount -t tmpfs -o mode=755 none /run
mount --bind "$MODULES" /lib/modules
chmod 1777 /tmp
hostname guest
ulimit -l unlimited
ulimit -c 0
ulimit -n 65536

modprobe -a rdma_rxe rdma_ucm veth sch_netem
# An address is there at once, or the table of GIDs would change under a program that has just begun.
for which in all default; do
    echo 0 >/proc/sys/net/ipv6/conf/$which/accept_dad
done
ip link set lo up
# 4096 bytes and their headers: the largest MTU of RDMA.
ip link add eth0 mtu 4500 type veth peer name eth0p mtu 4500
ip addr add 10.7.0.1/24 dev eth0
ip link set eth0p up
ip link set eth0 up
rdma link add rxe0 type rxe netdev eth0
if [ "$TWO_HOSTS" ]; then
    sh -e "$KVXFER_VM/two-hosts.sh"
fi
tries=0
while rdma link | grep -q DOWN; do
    tries=$((tries + 1))
    [ $tries -lt 100 ]
    sleep 0.1
done

set +e
unset MODULES TWO_HOSTS
: >/job/up
sh /job/command </dev/null >>/job/stdout 2>>/job/stderr
echo $? >/job/code.new
mv /job/code.new /job/code
echo b >/proc/sysrq-trigger
sleep 60
