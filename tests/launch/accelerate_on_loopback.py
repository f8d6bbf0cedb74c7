"""`accelerate launch` as it is, but for the store of its agent, which would listen on every interface."""

from __future__ import annotations

import socket
from typing import Any

from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed import TCPStore
from torch.distributed.elastic.rendezvous import static_tcp_rendezvous


def loopback_store(host: str, port: int, world_size: int, is_master: bool, *more: Any, **options: Any) -> TCPStore:
    """A TCPStore whose server, where this process has it, is bound to 127.0.0.1."""
    if is_master:
        listening = socket.create_server(("127.0.0.1", port))
        options["master_listen_fd"] = listening.detach()
    return TCPStore(host, port, world_size, is_master, *more, **options)


if __name__ == "__main__":
    static_tcp_rendezvous.TCPStore = loopback_store
    launch_command(launch_command_parser().parse_args())
