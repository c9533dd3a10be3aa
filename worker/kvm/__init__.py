"""QEMU: its command line, its processes and its monitor protocol. No Celery, no SQL."""
