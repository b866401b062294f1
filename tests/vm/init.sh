#!/bin/busybox sh
# The guest's first program, in its initrd. The root becomes the host's file system, which nothing here can change, under a throw-away layer in memory; /job is a folder of the host for both.
b=/bin/busybox
$b mount -t devtmpfs none /dev
$b mount -t proc none /proc
$b mount -t sysfs none /sys
for module in /modules/*; do
    $b insmod "$module"
done
options=trans=virtio,version=9p2000.L,msize=512000
$b mount -t 9p -o $options,ro,cache=loose host /host
$b mount -t tmpfs none /changes
$b mkdir /changes/upper /changes/work
$b mount -t overlay -o lowerdir=/host,upperdir=/changes/upper,workdir=/changes/work none /root
$b mkdir -p /root/job
$b mount -t 9p -o $options,cache=none job /root/job
for folder in dev proc sys; do
    $b mount -o move /$folder /root/$folder
done
exec $b switch_root /root /bin/sh /job/start
