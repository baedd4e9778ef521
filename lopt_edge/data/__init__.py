"""From a data file to micro-batches of token ids. In the order in which data meets them: `records` (file -> records with
their places), `formats` and `messages` (records -> `rows`; which fields are known: `columns`), `rendered`, `turns` and
`template` (row -> text and what of it is learned; `content`: is all of it there?), `encode`, `pieces` and `long_text` (text
-> ids and targets), `preferences` (which examples are preferred to which), `dataset` (all of it, counted), `order` (epochs,
windows, micro-batches), `report` (data check).

Rule: nothing here imports torch, and every fault of the user's file is an `InputError` that says where.
"""

from lopt_edge.data.dataset import READ_SETTINGS, Dataset, fingerprint_of, load_dataset, mismatched_part, split
from lopt_edge.data.encode import Example, encode_row, encode_rows, prompt_ids
from lopt_edge.data.formats import DATA_FORMATS, DataFormat, detect_format, to_conversation, to_rows
from lopt_edge.data.order import (
    IGNORED,
    MicroBatch,
    Window,
    collate,
    epoch_windows,
    members,
    micro_batches_of,
    packed_window,
    split_window,
    unit_lengths,
)
from lopt_edge.data.records import Record, read_records
from lopt_edge.data.report import check_facts, check_report, marked_pieces
from lopt_edge.data.rows import Conversation, Message, Preference, PromptCompletion, TextRow
from lopt_edge.data.template import ChatTemplate, leading_ids, load_template

__all__ = [
    "DATA_FORMATS",
    "IGNORED",
    "READ_SETTINGS",
    "ChatTemplate",
    "Conversation",
    "DataFormat",
    "Dataset",
    "Example",
    "Message",
    "MicroBatch",
    "Preference",
    "PromptCompletion",
    "Record",
    "TextRow",
    "Window",
    "check_facts",
    "check_report",
    "collate",
    "detect_format",
    "encode_row",
    "encode_rows",
    "epoch_windows",
    "fingerprint_of",
    "leading_ids",
    "load_dataset",
    "load_template",
    "marked_pieces",
    "members",
    "micro_batches_of",
    "mismatched_part",
    "packed_window",
    "prompt_ids",
    "read_records",
    "split",
    "split_window",
    "to_conversation",
    "to_rows",
    "unit_lengths",
]
