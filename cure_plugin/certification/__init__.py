"""Certification of a net for several sets and their union: cheapest bound first, attacks as the upper limit."""

from cure_plugin.certification.attack import Attack
from cure_plugin.certification.bound_methods import AlphaCrown, Coupled, Crown, CrownIbpBound, IbpBound, LipschitzBound
from cure_plugin.certification.branch_and_bound import BranchAndBound
from cure_plugin.certification.cascade import CASCADE
from cure_plugin.certification.certifier import Certifier
from cure_plugin.certification.dataset import certify_dataset
from cure_plugin.certification.method import METHODS, BoundMethod, Found, Method, Piece, PieceBounds, Work
from cure_plugin.certification.record import Record
from cure_plugin.certification.splitting import Splitting
from cure_plugin.certification.summary import Summary, summarize, wilson_interval
from cure_plugin.certification.verdict import Verdict

__all__ = [
    "CASCADE",
    "METHODS",
    "AlphaCrown",
    "Attack",
    "BoundMethod",
    "BranchAndBound",
    "Certifier",
    "Coupled",
    "Crown",
    "CrownIbpBound",
    "Found",
    "IbpBound",
    "LipschitzBound",
    "Method",
    "Piece",
    "PieceBounds",
    "Record",
    "Splitting",
    "Summary",
    "Verdict",
    "Work",
    "certify_dataset",
    "summarize",
    "wilson_interval",
]
