"""
schemathesis (pip install schemathesis) over the OpenAPI document of a running server: no 5xx, no undocumented status.

    python benchmarks/api_schemathesis.py [--examples 300]
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

from api_server import running

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
# An event stream of a live job has no end
STREAM = "/training/{job_id}/events"
# Takes seconds each
ROLLOUT = "/models/{name}/rollout"
FEW = 20


def run(url: str, examples: int, *more: str) -> int:
    """One run of the command; its exit status."""
    command = [str(Path(sys.executable).with_name("schemathesis")), "run", f"{url}/openapi.json", "--checks", CHECKS]
    command += [
        "--max-examples",
        str(examples),
        "--continue-on-failure",
        "--seed",
        "1",
        "--request-timeout",
        "60",
        "--no-color",
    ]
    command += ["--phases", "examples,coverage,fuzzing", "--generation-allow-x00", "true", "--exclude-path", STREAM, *more]
    return subprocess.run(command).returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=300, help="per operation and phase")
    examples = parser.parse_args().examples
    with running(SB3_GRPO_RATE_LIMIT="0", SB3_GRPO_MAX_TOTAL_TIMESTEPS="2000", SB3_GRPO_QUEUE_LIMIT="20") as server:
        # Something to find
        server.wait(server.train(env_name="CartPole-v1", total_timesteps=500, n_steps=16, model_name="cartpole"))
        url = f"http://127.0.0.1:{server.port}"
        statuses = [run(url, FEW, "--include-path", ROLLOUT), run(url, examples, "--exclude-path", ROLLOUT)]
        assert server.call("GET", "/health")[0] == 200
        stumbles = re.findall(r"Traceback.*?\n\n", server.log.read_text(), re.DOTALL)
        print(f"exit statuses {statuses}, tracebacks in the server's log: {len(stumbles)}")
        print("\n".join(stumbles[:3]))
    sys.exit(max(statuses))


if __name__ == "__main__":
    main()
