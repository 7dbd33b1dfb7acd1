"""What the compiled steps add to PyTorch's compiler. It takes a second to import: only for compiling."""

from __future__ import annotations

from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files


class WriteOnce(CustomGraphPass):
    """What is copied to a buffer in the end goes there at once, and is read from there. Else it is written twice."""

    def __call__(self, graph: torch.fx.Graph) -> None:
        for copy in graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default):
            buffer, source = copy.args[:2]
            to, of = (node.meta["val"] for node in (buffer, source))
            if len(buffer.users) == 1 and source.op == "call_function" and (to.dtype, to.shape) == (of.dtype, of.shape):
                source.append(copy)
                source.replace_all_uses_with(copy, delete_user_cb=lambda user, copy=copy: user is not copy)

    def uuid(self) -> Any:
        return get_hash_for_files((__file__,))
