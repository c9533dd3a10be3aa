"""QEMU's command line by subject; ``worker.kvm.arguments`` puts it together. Everything here is pure."""
