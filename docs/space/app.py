"""The demo page as a Hugging Face Space."""

from spd_zoo.demo import serve

serve(host="0.0.0.0")
