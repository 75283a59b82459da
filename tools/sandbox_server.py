"""Serves the sandbox over SandboxFusion's HTTP protocol.

    python tools/sandbox_server.py --port 8080
    SOD_SANDBOX_TOKEN=... python tools/sandbox_server.py --host 0.0.0.0 --port 8080

Without a token only this machine can reach it. SIGTERM ends every program and then the service.
"""

import argparse
import os
import sys

from megatron_sod.errors import SandboxError
from megatron_sod.sandbox import LEVELS, open_sandbox


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080, help="0 picks a free one")
    parser.add_argument("--level", default="auto", choices=("auto", *LEVELS))
    parser.add_argument("--timeout-s", type=float, default=10.0, help="limit where none is asked")
    parser.add_argument("--max-timeout-s", type=float, default=300.0, help="longest a client gets")
    parser.add_argument("--memory-mb", type=int, default=2048, help="default and upper limit")
    parser.add_argument("--max-concurrency", type=int, help="runs at a time; default: 2 per CPU")
    parser.add_argument("--max-waiting", type=int, default=256, help="beyond it clients get 429")
    parser.add_argument("--cold", action="store_true", help="a fresh interpreter per run")
    parser.add_argument("--preload", default="math", help="modules imported once, comma-separated")
    parser.add_argument("--allow-unsafe", action="store_true", help="permit level L0")
    return parser.parse_args()


def main():
    arguments = parse_arguments()
    try:
        from megatron_sod.sandbox.server import ServerSettings, check_address, serve
    except ImportError as error:
        sys.exit(f"the service needs aiohttp: pip install aiohttp ({error})")
    settings = ServerSettings(
        host=arguments.host,
        port=arguments.port,
        token=os.environ.get("SOD_SANDBOX_TOKEN"),
        num_waiting=arguments.max_waiting,
        max_timeout_s=arguments.max_timeout_s,
    )
    try:
        check_address(settings)
        sandbox = open_sandbox(
            arguments.level,
            timeout_s=arguments.timeout_s,
            memory_mb=arguments.memory_mb,
            warm=not arguments.cold,
            preload=tuple(filter(None, arguments.preload.split(","))),
            max_concurrency=arguments.max_concurrency,
            allow_unsafe=arguments.allow_unsafe,
        )
    except SandboxError as error:
        sys.exit(str(error))

    def announce(port):
        print(f"sandbox {sandbox.level} on http://{settings.host}:{port}", flush=True)

    with sandbox:
        serve(sandbox, settings, announce)


if __name__ == "__main__":
    main()
