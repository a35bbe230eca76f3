#!/bin/sh
# pid 1 of one machine of the rig. The caller has unshared net, mount, pid, uts and ipc; what is made here dies with it.
#   namespaces.sh operator NAME FOLDER           the desk from which the user works; it holds the switch br0
#   namespaces.sh node NAME FOLDER VENV SHARED   a pod with its own sshd, home, /tmp/ray, /run and /dev/shm
set -eu
role=$1 name=$2 folder=$3
mount --make-rprivate /
hostname "$name"
mkdir -p /tmp/ray "$folder/$name/ray"
mount --bind "$folder/$name/ray" /tmp/ray
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /mnt
mkdir /mnt/home /run/sshd
mount --bind "$folder/$name/home" /mnt/home
mount --bind "$folder/passwd" /etc/passwd
mount --bind "$folder/shadow" /etc/shadow
ip link set lo up
if [ "$role" = operator ]; then
    ip link add br0 type bridge
    ip addr add 10.77.0.1/24 dev br0
    ip link set br0 up
    touch /run/ready
    while :; do sleep 3600 & wait; done # a pid 1 that reaps
fi
mkdir /mnt/venv /mnt/shared
mount --bind "$4" /mnt/venv
mount -o remount,bind,ro /mnt/venv
mount --bind "$5" /mnt/shared
mount -t tmpfs -o size=500m tmpfs /dev/shm
exec /usr/sbin/sshd -D -e -f "$folder/sshd_config"
