"""Nodes that are emptied of their guests, and nodes that are given up.

marks.py         what SQL says of a node: drained, fenced; and what that forbids
targets.py       which nodes can take guests, and how much of their memory is free
parts.py         the jobs that a drain or a failover is made of
evacuation.py    guests leave a node: what comes next
drain.py         every guest of a node that lives is moved to others
holding.py       a node begins no more jobs that change its guests
fence.py         a node is known to be off: its guests are other nodes' to start
giving_up.py     what such a node had, released in SQL
"""
