"""The script that Streamlit runs for each visitor and after each click."""

from dat_lightning.explore.page import draw_page
from dat_lightning.explore.serving import served

draw_page(served())
