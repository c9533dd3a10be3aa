"""What keeps a QEMU away from the rest of the host: whose files it may open, who has a uid, what it left behind."""
