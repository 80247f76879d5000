"""What processes compare and how one leaves, against a stand-in for JAX's coordination service."""

import itertools
import json
import os
from types import SimpleNamespace

import jax
import pytest

from cdetr_jax.training import processes


class Service(dict):
    """Keys and values; what is not there is an error, as with JAX."""

    key_value_set = dict.__setitem__

    def key_value_try_get(self, key):
        if key not in self:
            raise jax.errors.JaxRuntimeError(f"NOT_FOUND: {key}")
        return self[key]

    def blocking_key_value_get(self, key, timeout_in_ms):
        assert timeout_in_ms > 0
        return self.key_value_try_get(key)


@pytest.fixture
def service(monkeypatch):
    """This process is the first of two, host a."""
    service = Service()
    state = SimpleNamespace(client=service, num_processes=2, process_id=0)
    monkeypatch.setattr(processes.distributed, "global_state", state)
    monkeypatch.setattr(processes, "_rounds", itertools.count())
    monkeypatch.setattr(processes.socket, "gethostname", lambda: "a")
    return service


@pytest.fixture
def ends(service, monkeypatch):
    """What `leave` does at last: (seconds it sleeps, or "status", what the others can read)."""
    ends = []
    monkeypatch.setattr(processes.time, "sleep", lambda seconds: ends.append((seconds, dict(service))))
    monkeypatch.setattr(os, "_exit", lambda status: ends.append((f"status {status}", dict(service))))
    return ends


def test_alike_facts_pass_and_one_process_asks_nobody(service):
    service["cdetr/facts/0/1"] = json.dumps(["process 1 (b)", {"x": [1, 2]}])
    processes.agree({"x": (1, 2)})
    service.clear()
    processes.distributed.global_state.client = None
    processes.agree({"x": 1})
    assert not service


def test_a_fact_holds_on_all_processes_or_not_at_all(service):
    for round_, (mine, others) in enumerate([(True, True), (True, False), (False, True)]):
        service[f"cdetr/facts/{round_}/1"] = json.dumps(others)
        assert processes.on_all(mine) == (mine and others)
    processes.distributed.global_state.client = None
    assert processes.on_all(True)


def test_what_differs_is_named_with_both_values(service):
    service["cdetr/facts/0/1"] = json.dumps(["process 1 (b)", {"config.seed": 1, "step": 3, "long": "x" * 200}])
    message = (
        r"^the processes of this run differ: config.seed is 0 on process 0 \(a\), 1 on process 1 \(b\); long is x{100}"
        r"\.\.\. \(\w{8}\) on process 0 \(a\), x{100}\.\.\. \(\w{8}\) on process 1 \(b\); late is 5 on process 0 "
        r"\(a\), nothing on process 1 \(b\)\. Start the same command"
    )
    with pytest.raises(ValueError, match=message):
        processes.agree({"config.seed": 0, "step": 3, "long": "x" * 199 + "y", "late": 5})


def test_a_workdir_that_another_process_does_not_see(service, tmp_path):
    fact = {"what process 0 writes to the workdir": "not seen in w"}
    service["cdetr/facts/1/1"] = json.dumps(["process 1 (b)", fact])
    message = r"what process 0 writes to the workdir is seen on process 0 \(a\), not seen in w on process 1 \(b\)"
    with pytest.raises(ValueError, match=message):
        processes.check_shared(tmp_path)
    assert (tmp_path / ".shared").read_text() == service["cdetr/shared/0"]


def test_the_first_process_leaves_when_the_others_know_why(service, ends):
    service["cdetr/seen/1"] = "yes"
    processes.leave(3, "the disk is full")
    (_, told), (how, _) = ends
    assert told["cdetr/failed"] == "process 0 (a) has failed: the disk is full"
    assert how == "status 3"


def test_what_xla_reports_is_left_to_the_process_that_failed(service, ends):
    lost = OSError("could not write")
    lost.__cause__ = jax.errors.JaxRuntimeError("UNKNOWN: Gloo: connection closed by peer")
    processes.leave(1, "a collective", lost)
    assert ends[0] == (processes.HEARTBEAT_S + 5, {})
    ends.clear()
    processes.leave(1, "no memory", jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"))
    assert "cdetr/failed" in ends[0][1]


def test_a_process_that_is_alone_stays(ends):
    processes.distributed.global_state.num_processes = 1
    processes.leave(1, "an error")
    assert ends == []
