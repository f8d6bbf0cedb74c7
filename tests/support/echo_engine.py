"""A small real engine without a model, for those who have to do with its events only."""

from __future__ import annotations

import threading

from softprompt.engine import Aborted, Answer, Finished, Tokens
from softprompt.errors import DataError, QueueFullError


class Echo:
    """An engine that answers with the request's own ids, one of each running request per step."""

    def __init__(self, max_running=10**9):
        self.max_running = max_running
        self.breaks_with = None  # what the next step raises
        self.may_add = threading.Event()
        self.may_add.set()
        self.is_adding = threading.Event()
        self.running, self.done, self.threads = {}, {}, set()
        self.given_up, self.num_steps, self.num_asked, self.is_closed = [], 0, 0, False

    @property
    def has_work(self):
        self.threads.add(threading.current_thread())
        self.num_asked += 1
        return bool(self.running)

    def add(self, request):
        self.threads.add(threading.current_thread())
        self.is_adding.set()
        assert self.may_add.wait(100)
        if not request.ids:
            raise DataError("an empty text")
        if len(self.running) >= self.max_running:
            raise QueueFullError("full")
        number = len(self.running) + len(self.done)
        self.running[number] = iter(request.ids)
        return number

    def abort(self, request):
        self.threads.add(threading.current_thread())
        if request in self.running:
            self.given_up.append(request)

    def step(self):
        self.threads.add(threading.current_thread())
        self.num_steps += 1
        if self.breaks_with is not None:
            raise self.breaks_with
        events = [self._end(Aborted(number, "asked")) for number in set(self.given_up) & set(self.running)]
        for number, ids in list(self.running.items()):
            end = Finished(number, (Answer((), "", "stop"),), 0, 0)
            token = next(ids, None)
            events.append(self._end(end) if token is None else Tokens(number, 0, (token,), ""))
        return events

    def _end(self, event):
        del self.running[event.request]
        self.done[event.request] = event
        return event

    def stats(self):
        self.threads.add(threading.current_thread())
        return self.num_steps

    def close(self):
        self.threads.add(threading.current_thread())
        self.is_closed = True
