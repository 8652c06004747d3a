"""A store like S3 (moto), which checks signatures: python s3.py FOLDER PORT.

It has the bucket `disks`, with an object of the bytes of FOLDER/disk.raw, and a user with the keys in FOLDER/access-key
and FOLDER/secret-key. With each line that it reads it takes the file anew, or removes the object where there is none,
and says `done`.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import urllib.request
from pathlib import Path
from typing import Any

BUCKET = "disks"
KEY = "disk image.raw"


def serve(folder: Path, port: int) -> None:
    os.environ["INITIAL_NO_AUTH_ACTION_COUNT"] = "1000"
    boto3, server = importlib.import_module("boto3"), importlib.import_module("moto.server")
    url = f"http://127.0.0.1:{port}"
    server.ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False).start()

    def client(service: str, access_key: str, secret_key: str) -> Any:
        keys = {"aws_access_key_id": access_key, "aws_secret_access_key": secret_key}
        return boto3.client(service, endpoint_url=url, region_name="us-east-1", **keys)

    iam = client("iam", "nobody", "nothing")
    iam.create_user(UserName="reader")
    everything = {"Effect": "Allow", "Action": "s3:*", "Resource": "*"}
    policy = json.dumps({"Version": "2012-10-17", "Statement": [everything]})
    iam.put_user_policy(UserName="reader", PolicyName="all", PolicyDocument=policy)
    keys = iam.create_access_key(UserName="reader")["AccessKey"]
    s3 = client("s3", keys["AccessKeyId"], keys["SecretAccessKey"])
    s3.create_bucket(Bucket=BUCKET)
    plain = {"Content-Type": "text/plain"}
    with urllib.request.urlopen(urllib.request.Request(f"{url}/moto-api/reset-auth", b"0", plain)):
        pass  # from now on it checks signatures
    words = {"Bucket": BUCKET, "Key": KEY}
    for name, text in (
        ("access-key", keys["AccessKeyId"]),
        ("secret-key", keys["SecretAccessKey"]),
    ):
        (folder / name).write_text(f"{text}\n")
        (folder / name).chmod(0o600)
    while True:
        if (folder / "disk.raw").exists():
            s3.put_object(**words, Body=(folder / "disk.raw").read_bytes())
        else:
            s3.delete_object(**words)
        print("done", flush=True)
        if not sys.stdin.readline():
            return


if __name__ == "__main__":
    serve(Path(sys.argv[1]), int(sys.argv[2]))
