"""How the ends of a new link prove to each other that they know the job's secret, unsent.

    caller -> answerer    who calls whom, a nonce
    answerer -> caller    a nonce, its proof
    caller -> answerer    its proof

A proof is an HMAC-SHA256 over the prover's role, both nonces and both nodes: it fits no other
connection (fresh nonces), no other end (roles) and no other pair. Nothing here has a length that a
stranger chooses. No I/O. The link is not encrypted: whoever can change packets can change numbers.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from dataclasses import dataclass

from elastic.core.errors import ProtocolError

SECRET_BYTES = 32
NONCE_BYTES = 32

_HELLO = struct.Struct("<8sII32s")  # magic, caller, answerer, the caller's nonce
_ANSWER = struct.Struct("<32s32s")  # the answerer's nonce, its proof
_NODES = struct.Struct("<II")
_MAGIC = b"elastic1"
_PROOF_BYTES = 32


@dataclass(frozen=True, slots=True)
class Credentials:
    """Who this node is, and what every node of the job knows and nobody else."""

    node: int
    secret: bytes

    def __post_init__(self) -> None:
        if len(self.secret) != SECRET_BYTES:
            raise ValueError(f"a secret of {len(self.secret)} bytes, not {SECRET_BYTES}")

    def __repr__(self) -> str:
        return f"Credentials(node={self.node})"  # a secret in a log is none


class Caller:
    """The end that calls: send `hello`, then what `handle` returns for each `num_expected` bytes.

    `num_expected` is 0 once the other end is known to be `peer`.
    """

    def __init__(self, credentials: Credentials, peer: int, nonce: bytes) -> None:
        self._secret, self._nonce = credentials.secret, nonce
        self._nodes = _NODES.pack(credentials.node, peer)
        self.peer = peer
        self.hello = _HELLO.pack(_MAGIC, credentials.node, peer, nonce)
        self.num_expected = _ANSWER.size

    def handle(self, data: bytes) -> bytes:
        """Raises ProtocolError if the other end knows no secret of ours."""
        nonce, proof = _ANSWER.unpack(data)
        nonces = self._nonce + nonce
        _check(proof, _prove(self._secret, b"answerer", nonces, self._nodes))
        self.num_expected = 0
        return _prove(self._secret, b"caller", nonces, self._nodes)


class Answerer:
    """The end that was called. `peer` is what the caller says of itself; proven at the end."""

    def __init__(self, credentials: Credentials, nonce: bytes) -> None:
        self._credentials, self._nonce = credentials, nonce
        self._nonces = b""
        self.peer = -1
        self.num_expected = _HELLO.size

    def handle(self, data: bytes) -> bytes:
        """Raises ProtocolError if the other end is no node of the job, or wants another one."""
        if not self._nonces:
            return self._answer(data)
        _check(data, self._prove(b"caller"))
        self.num_expected = 0
        return b""

    def _answer(self, hello: bytes) -> bytes:
        magic, caller, answerer, nonce = _HELLO.unpack(hello)
        if magic != _MAGIC:
            raise ProtocolError(f"not a node: {hello!r}")
        if answerer != self._credentials.node or caller == answerer:
            here = self._credentials.node
            raise ProtocolError(f"node {caller} calls node {answerer}; this is node {here}")
        self.peer = caller
        self._nonces = nonce + self._nonce
        self.num_expected = _PROOF_BYTES
        return _ANSWER.pack(self._nonce, self._prove(b"answerer"))

    def _prove(self, role: bytes) -> bytes:
        nodes = _NODES.pack(self.peer, self._credentials.node)
        return _prove(self._credentials.secret, role, self._nonces, nodes)


def _prove(secret: bytes, role: bytes, nonces: bytes, nodes: bytes) -> bytes:
    return hmac.digest(secret, role + nonces + nodes, hashlib.sha256)


def _check(proof: bytes, expected: bytes) -> None:
    if not hmac.compare_digest(proof, expected):
        raise ProtocolError("the other end does not know the job's secret")
