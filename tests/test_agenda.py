"""The agenda: who dies is replaced by somebody who finds in it where to go on."""

from __future__ import annotations

from forked import fork, wait

from evmp.agenda import Agenda
from evmp.grid import Block

BLOCKS = [Block(40, 60), Block(0, 20), Block(20, 40)]


def test_blocks_keep_the_order_in_which_they_were_given() -> None:
    agenda = Agenda.of(BLOCKS)

    assert [agenda[number] for number in range(agenda.n_given)] == BLOCKS
    assert agenda.is_closed


def test_rows_are_of_the_block_that_began_last_before_them() -> None:
    agenda = Agenda.of(BLOCKS)
    agenda.begin(0, 0)
    agenda.begin(1, 24)  # behind rows that only fill a batch up

    assert [agenda.block_of(n, 0) for n in (0, 19, 23, 24, 50)] == [0, 0, 0, 1, 1]


def test_block_whose_first_row_was_not_published_is_begun_again() -> None:
    agenda = Agenda.of(BLOCKS)
    agenda.begin(0, 0)
    agenda.begin(1, 20)

    assert agenda.resume(20) == 0
    assert agenda.n_begun == 1
    agenda.begin(1, 24)
    assert agenda.resume(25) == 1
    assert Agenda.of(BLOCKS).resume(0) == -1


def test_agenda_takes_more_blocks_as_the_writer_gets_on() -> None:
    agenda = Agenda(2)
    for number in range(50):
        agenda.give(Block(number, number + 1))
        agenda.begin(number, number)
        agenda.note(number, number + 1)
        assert agenda.is_full == (number > 0)
        if number:
            agenda.finish(number)
            agenda.settle(agenda.n_done)
            assert agenda[number - 1] == Block(number - 1, number)
            assert agenda.committed(number) == number + 1


def test_processes_see_what_others_note() -> None:
    agenda = Agenda(8)

    def keep() -> None:
        agenda.give(Block(3, 5))
        agenda.close()

    assert wait(fork(keep)) == 0
    assert (agenda.n_given, agenda[0], agenda.is_closed) == (1, Block(3, 5), True)
