"""``hostler doctor``: what this host lacks to run guests, and how to get it. It repairs nothing by itself."""
