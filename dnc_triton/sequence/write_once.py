"""What the compiled steps add to PyTorch's compiler. It takes a second to import: only for compiling."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node

_aten = torch.ops.aten
_VIEWS = {_aten.unsqueeze.default, _aten.squeeze.dim, _aten.squeeze.default, _aten.view.default}


class WriteOnce(CustomGraphPass):
    """Writes what is copied to a buffer in the end there at once, and reads it from there. Else it is written twice."""

    def __call__(self, graph: Graph) -> None:
        for copy in graph.find_nodes(op="call_function", target=_aten.copy_.default):
            buffer, source = copy.args[:2]
            if source.target is _aten.copy.default and _form(source.args[1]) == _form(source):
                source.replace_all_uses_with(source.args[1])
                graph.erase_node(source)
                source = copy.args[1]
            if len(buffer.users) == 1 and source.op == "call_function" and _form(buffer) == _form(source):
                _read_instead(graph, source, copy)

    def uuid(self) -> Any:
        return get_hash_for_files((__file__,))


def _form(node: Node) -> tuple[torch.dtype, torch.Size]:
    return node.meta["val"].dtype, node.meta["val"].shape


def _read_instead(graph: Graph, source: Node, copy: Node) -> None:
    """Puts the copy right after its source, and lets all others read it instead of that and what that is a view of."""
    chain = [source]
    while chain[0].target in _VIEWS and chain[0].args[0].op == "call_function":  # type: ignore[union-attr]
        chain.insert(0, chain[0].args[0])  # type: ignore[arg-type]
    if chain[0].target is operator.getitem:  # of an operator, which writes where it likes, or was given the buffer
        return
    for node, view in zip(chain, [*chain[1:], copy], strict=True):
        node.append(view)
    for node in chain:
        others = [user for user in node.users if user is not copy and user not in chain]
        if others:
            with graph.inserting_after(copy):
                seen = graph.call_function(_aten.view.default, (copy, node.meta["val"].shape))
            seen.meta = dict(node.meta)
            for user in others:
                user.replace_input_with(node, seen)
