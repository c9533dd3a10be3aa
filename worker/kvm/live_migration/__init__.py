"""Live migration as QEMU does it, seen from both ends. No SQL, no jobs: who owns the guest is decided elsewhere.

Reference: QEMU's "Migration" in docs/devel/migration and qapi/migration.json. The order of calls:

    target   ``prepare(incoming=True)``, ``Incoming.listen``
    source   ``prepare(incoming=False)``, ``Outgoing.start``, ``follow`` until ``pre-switchover``, ``switch_over``,
             ``follow`` until the end
    target   ``follow`` until the end, then the guest is continued by who owns it
"""
