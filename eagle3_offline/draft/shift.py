"""The one place where tokens and features are shifted against each other. Legend: T tokens, K unroll steps.

Row p of a conversation pairs the target's feature at token p with the token p+1, and is the root of a chain. At step k
it reads the token x[p+1+k] and predicts x[p+2+k]; the target's own opinion about that token is softmax(W last[p+1+k]).
A drafted token is used at serving only if the chain's root token x[p+1] and the predicted token are in one answer:

    t               0  1  2  3  4  5  6  7  8
    token           s  u  A  B  C  D  u  E  F      s, u: prompt;  A B C D: first answer;  E F: second answer
    turn            0  0  1  1  1  1  0  2  2

    step 0, rows p     1 (A>B)  2 (B>C)  3 (C>D)  6 (E>F)
    step 1, rows p     1 (A B>C)  2 (B C>D)
    step 2, rows p     1 (A B C>D)

Row 1 is the first root of a turn: its feature is the prompt's last token, its token the first one of the answer.
Row 4 (root D) predicts nothing: what follows D is the user's. SpecForge's unshifted m[p+k] (its issue 885) loses row 1
and trains rows past the end.
"""

from __future__ import annotations

import numpy as np


def serving_rows(turn: np.ndarray, step: int) -> np.ndarray:
    """Rows p that are alive at a step: m[p+1] * m[p+2+step], both inside the same answer.

    turn [T] int: number of the answer that each token belongs to, 0 outside (records.turn_of_token). Returns int64 [n], ascending.
    Alive rows of step k+1 are a subset of those of step k, since an answer is an interval.
    """
    if len(turn) < step + 3:
        return np.zeros(0, np.int64)
    root, predicted = turn[1 : len(turn) - 1 - step], turn[2 + step :]
    return np.flatnonzero((root > 0) & (root == predicted))


def input_token(row: np.ndarray, step: int) -> np.ndarray:
    """Position of the token that a row reads at a step. The teacher of that row and step is the last state at the same position."""
    return row + 1 + step


def predicted_token(row: np.ndarray, step: int) -> np.ndarray:
    """Position of the token that a row predicts at a step."""
    return row + 2 + step


def first_root(turn_start: int) -> int:
    """The row whose root token is the first token of an answer."""
    return turn_start - 1
