"""Certification of a net for several sets and their union: cheapest bound first, attacks as the upper limit."""

from cure_plugin.certification.certifier import Certifier
from cure_plugin.certification.dataset import certify_dataset
from cure_plugin.certification.record import Record
from cure_plugin.certification.summary import Summary, summarize, wilson_interval
from cure_plugin.certification.verdict import Verdict

__all__ = ["Certifier", "Record", "Summary", "Verdict", "certify_dataset", "summarize", "wilson_interval"]
