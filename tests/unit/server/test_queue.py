from collections import Counter

from engines import make_spec
from hypothesis import given
from hypothesis import strategies as st

from flux_nf4.server.jobs import Job
from flux_nf4.server.queue import FairQueue


def make_job(owner):
    return Job(make_spec(), owner=owner, api="jobs")


def make_queue(owners):
    queue = FairQueue()
    for owner in owners:
        queue.push(make_job(owner))
    return queue


def anybody(owner):
    return True


def pop_all(queue):
    jobs = []
    while (job := queue.pop(anybody)) is not None:
        jobs.append(job)
    return jobs


def owners_of(jobs):
    return "".join(job.owner for job in jobs)


def test_owners_take_turns():
    assert owners_of(pop_all(make_queue("aaabbc"))) == "abcaba"


def test_a_newcomer_waits_for_one_round_at_most():
    queue = make_queue("aaaa")
    queue.pop(anybody)
    queue.push(make_job("b"))

    assert owners_of(pop_all(queue)) == "abaa"


def test_an_owner_at_his_limit_is_passed_over():
    queue = make_queue("aab")

    assert queue.pop(lambda owner: owner != "a").owner == "b"


def test_nobody_may_run_gives_nothing():
    queue = make_queue("ab")

    assert queue.pop(lambda owner: False) is None
    assert len(queue) == 2


def test_a_job_that_lost_its_worker_goes_first():
    queue = make_queue("ab")
    again = make_job("z")
    queue.push_again(again)

    assert queue.pop(anybody) is again


def test_a_removed_job_does_not_come():
    queue = make_queue("aab")
    first = next(iter(queue))

    queue.remove(first)
    assert first not in pop_all(queue)


def test_a_queue_with_room_is_full_for_nobody():
    assert not make_queue("aaa").is_full("a", 4)


def test_who_filled_the_queue_gets_no_more_in():
    assert make_queue("aaaa").is_full("a", 4)


def test_who_has_less_than_his_share_gets_in():
    assert not make_queue("aaaa").is_full("b", 4)
    assert not make_queue("aaaab").is_full("b", 4)


def test_who_has_his_share_gets_no_more_in():
    assert make_queue("aaaabb").is_full("b", 4)


@given(st.lists(st.sampled_from("abcdefgh"), max_size=200), st.integers(1, 10))
def test_a_queue_stays_within_measure(owners, size):
    queue = FairQueue()
    for owner in owners:
        if not queue.is_full(owner, size):
            queue.push(make_job(owner))

    num_owners = len(set(owners))
    assert len(queue) <= size * sum(1 / number for number in range(1, num_owners + 1))


@given(st.lists(st.sampled_from("abcde"), max_size=40))
def test_the_order_shown_is_the_order_taken(owners):
    queue = make_queue(owners)
    shown = list(queue)

    assert shown == pop_all(queue)


@given(
    st.lists(
        st.one_of(st.sampled_from("abcde"), st.none()),  # a new job of an owner; None: take one
        max_size=120,
    )
)
def test_nobody_waits_for_two_jobs_of_another(steps):
    """While an owner waits, no other has two jobs more taken than he has."""
    queue, waiting = FairQueue(), Counter()
    passed = {}  # of each owner who waits: how many of each other's jobs came since his last
    for owner in steps:
        if owner is not None:
            queue.push(make_job(owner))
            waiting[owner] += 1
            passed.setdefault(owner, Counter())
        elif (job := queue.pop(anybody)) is not None:
            waiting[job.owner] -= 1
            for other, counts in passed.items():
                if other != job.owner:
                    counts[job.owner] += 1
            if waiting[job.owner]:
                passed[job.owner] = Counter()
            else:
                del passed[job.owner]
            assert all(max(counts.values(), default=0) <= 1 for counts in passed.values())


@given(st.lists(st.sampled_from("abc"), max_size=40))
def test_an_owners_jobs_keep_their_order(owners):
    queue = FairQueue()
    pushed = [make_job(owner) for owner in owners]
    for job in pushed:
        queue.push(job)
    taken = pop_all(queue)

    for owner in "abc":
        assert [j for j in taken if j.owner == owner] == [j for j in pushed if j.owner == owner]
