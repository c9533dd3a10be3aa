"""Whether the database and the host agree, both ways: what SQL has and the host has not, and the other way round.

    records.py       what the database says, in a handful of queries
    host_facts.py    what the host says, in one look at /proc
    findings.py      a finding, a kind of findings, and what they are found in
    *_kinds.py       the kinds: how each is found, and how it is repaired
    auditing.py      looking twice, so that what is in motion is no finding
    repairing.py     acting, on what still holds, beside no job
    patrol.py        the worker's own audits, which only report

A further kind (network namespaces, once hostler makes any) is one more fact in ``host_facts`` or
``records`` and one more ``Kind`` in the list of a ``*_kinds`` module; nothing else has to know of it.
"""
