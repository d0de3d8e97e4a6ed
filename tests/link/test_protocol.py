"""The protocol's rules, by feeding messages: no socket, no server."""

import pickle

import pytest

from longrein import errors
from longrein.link import codec
from longrein.link import messages as m
from longrein.link.protocol import FAULTS, NOT_TAKEN, Ledger, Sheet, Verdict, error_of, new_lease_name

LEASE = "l" * 22


def step(n: int, epoch: int = 1) -> m.Step:
    return m.Step(LEASE, epoch, n)


def ready_ledger(last: int) -> Ledger:
    """A ledger in which `last` requests were taken and answered, the first of them a Reset."""
    ledger = Ledger()
    for n in range(1, last + 1):
        request = m.Reset(LEASE, 1, n) if n == 1 else step(n)
        assert ledger.judge(request) == (Verdict.TAKE, "")
        ledger.take(request)
        ledger.answer(n, b"answer %d" % n)
    return ledger


def test_the_next_number_is_taken() -> None:
    assert ready_ledger(3).judge(step(4)) == (Verdict.TAKE, "")


def test_an_answered_number_is_repeated_from_the_window() -> None:
    ledger = ready_ledger(9)
    for n in (6, 7, 8, 9):
        assert ledger.judge(step(n)) == (Verdict.REPEAT, "")
        assert ledger.answers[n] == b"answer %d" % n
    assert len(ledger.answers) == ledger.window


def test_a_number_that_left_the_window_is_stale() -> None:
    assert ready_ledger(9).judge(step(5)) == (Verdict.REFUSE, "stale")


def test_a_number_still_at_work_waits() -> None:
    ledger = ready_ledger(3)
    ledger.take(step(4))
    assert ledger.judge(step(4)) == (Verdict.WAIT, "")


def test_a_gap_is_refused_and_takes_nothing() -> None:
    ledger = ready_ledger(3)
    assert ledger.judge(step(5)) == (Verdict.REFUSE, "gap")
    assert ledger.judge(step(4)) == (Verdict.TAKE, "")


def test_at_most_a_window_of_requests_is_without_an_answer() -> None:
    ledger = ready_ledger(1)
    for n in range(2, 2 + ledger.window):
        assert ledger.judge(step(n)) == (Verdict.TAKE, "")
        ledger.take(step(n))
    assert ledger.judge(step(2 + ledger.window)) == (Verdict.REFUSE, "busy")


def test_a_higher_epoch_fences_the_lower_one() -> None:
    ledger = ready_ledger(3)
    assert ledger.take_over(2)
    assert ledger.judge(step(4, epoch=1)) == (Verdict.REFUSE, "fenced")
    assert ledger.judge(step(4, epoch=2)) == (Verdict.TAKE, "")
    assert ledger.take_over(2), "the same Resume again is answered again"
    assert not ledger.take_over(1)


def test_an_epoch_that_nobody_announced_is_out_of_turn() -> None:
    assert ready_ledger(1).judge(step(2, epoch=7)) == (Verdict.REFUSE, "out_of_turn")


def test_a_step_before_the_first_reset_uses_its_number_up() -> None:
    assert Ledger().judge(step(1)) == (Verdict.TAKE, "reset_needed")


def test_sheet_numbers_from_one_and_stops_at_the_window() -> None:
    sheet = Sheet(LEASE)
    for n in range(1, sheet.window + 1):
        assert sheet.number() == n
        sheet.sent(n, m.Step, codec.encode(step(n)))
    with pytest.raises(errors.LocalProtocolError, match="no answer yet"):
        sheet.number()


def test_sheet_drops_answers_to_older_requests_and_other_leases() -> None:
    sheet = Sheet(LEASE)
    for n in (1, 2):
        sheet.number()
        sheet.sent(n, m.Step, codec.encode(step(n)))
    assert not sheet.accept(m.Stepped(LEASE, 1), waiting_for=2)
    assert list(sheet.unanswered) == [2]
    assert not sheet.accept(m.Stepped("another", 2), waiting_for=2)
    assert not sheet.accept(m.Working(LEASE, 2, 1.0), waiting_for=2)
    assert sheet.accept(m.Stepped(LEASE, 2), waiting_for=2)
    assert not sheet.unanswered


def test_a_fault_that_took_nothing_leaves_the_request_open() -> None:
    sheet = Sheet(LEASE)
    sheet.number()
    sheet.sent(1, m.Step, codec.encode(step(1)))
    for code in NOT_TAKEN:
        assert sheet.accept(m.Fault(LEASE, 1, code, ""), waiting_for=1)
        assert list(sheet.unanswered) == [1]


def test_repeats_come_in_order_and_in_the_new_epoch() -> None:
    sheet = Sheet(LEASE)
    for n in (1, 2, 3):
        sheet.number()
        sheet.sent(n, m.Step, codec.encode(step(n), b"region %d" % n))
    sheet.accept(m.Stepped(LEASE, 1), waiting_for=3)
    sheet.next_epoch()
    repeats = []
    for data in sheet.repeats():
        request, offset = codec.decode_request(data)
        repeats.append((request.n, request.epoch, data[offset:]))
    assert repeats == [(2, 2, b"region 2"), (3, 2, b"region 3")]


def test_lease_names_are_long_and_distinct() -> None:
    names = {new_lease_name() for _ in range(1000)}
    assert len(names) == 1000
    assert all(len(name) >= 16 for name in names)


@pytest.mark.parametrize("code", sorted(FAULTS))
def test_each_fault_is_one_typed_error_that_pickles(code: str) -> None:
    details = {"path": "action", "expected": "0 or 1", "got": "7"}
    error = error_of(m.Fault(LEASE, 1, code, "what happened", details=details, exception="ValueError"), "ws://far")
    assert isinstance(error, errors.Error)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert again.__dict__ == error.__dict__


def test_an_unknown_fault_is_a_protocol_error() -> None:
    assert isinstance(error_of(m.Fault(LEASE, 1, "new", "?"), "ws://far"), errors.RemoteProtocolError)
