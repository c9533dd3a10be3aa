"""Kombu's Redis transport, except that a message is never out of Redis's hands before somebody has it.

Kombu takes a message with BRPOP and notes it as unacknowledged in a second step. A worker that is killed while it waits
still has its socket for some milliseconds, in which Redis hands it what arrives; and a worker or broker may end between
the two steps. Either loses the message. Here waiting moves nothing (BLMOVE from a list's end to the same end), and
taking and noting are one script, which Redis carries out wholly or not at all.
"""

from __future__ import annotations

from time import time
from typing import Any

from kombu.transport import redis
from kombu.transport.virtual import Empty
from kombu.utils.encoding import bytes_to_str
from kombu.utils.json import loads

WAIT_S = 0.5
"""Waiting is for the list of the default priority alone; one that is sent with another waits at most this long."""

TAKE = """
local priorities = {unpack(KEYS, 3)}
for _, key in ipairs(priorities) do
  local item = redis.call('RPOP', key)
  if item then
    local read, properties = pcall(function () return cjson.decode(item).properties end)
    if read and properties and type(properties.delivery_tag) == 'string' then
      local info = properties.delivery_info
      local noted = '[' .. item .. ',' .. cjson.encode(info.exchange) .. ',' .. cjson.encode(info.routing_key) .. ']'
      redis.call('ZADD', KEYS[1], ARGV[1], properties.delivery_tag)
      redis.call('HSET', KEYS[2], properties.delivery_tag, noted)
    end
    return {key, item}
  end
end
return false
"""
"""As kombu's QoS.append notes it (unacked index, unacked), which afterwards does so again. What is no message is handed
on without a note."""


class Channel(redis.Channel):
    """Waits for one queue and takes from it; with more of them, or with a key prefix, as kombu does."""

    def _is_ours(self) -> bool:
        return len(self.active_queues) == 1 and not self.global_keyprefix

    def _brpop_start(self, timeout: float | None = None) -> None:
        if not self._is_ours():
            super()._brpop_start(timeout)
            return
        (queue,) = self._queue_cycle.consume(1)
        self._in_poll = self.client.connection
        key = self._q_for_pri(queue, 0)
        self.client.connection.send_command("BLMOVE", key, key, "RIGHT", "RIGHT", WAIT_S)

    def _brpop_read(self, **options: Any) -> bool:
        if not self._is_ours():
            return bool(super()._brpop_read(**options))
        try:
            try:
                self.client.parse_response(self.client.connection, "BLMOVE", **options)
            except self.connection_errors:
                self.client.connection.disconnect()  # the next round connects again
                raise
            taken = None if self._closing else self._take()
            if not taken:
                raise Empty
            self.connection._deliver(loads(bytes_to_str(taken[1])), bytes_to_str(taken[0]).rsplit(self.sep, 1)[0])
            return True
        finally:
            self._in_poll = None

    def _take(self) -> list[bytes] | None:
        (queue,) = self.active_queues
        keys = [self._q_for_pri(queue, priority) for priority in self.priority_steps]
        with self.conn_or_acquire() as client:
            script = client.register_script(TAKE)
            taken: list[bytes] | None = script([self.unacked_index_key, self.unacked_key, *keys], [time()])
            return taken


class Transport(redis.Transport):
    """Kombu's, with our channel."""

    Channel = Channel
