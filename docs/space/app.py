"""The demo page as a Hugging Face Space, behind the Hub's proxy."""

import os

from spd_zoo.demo import serve

serve(host="0.0.0.0", allow_hosts=[os.environ["SPACE_HOST"]])
