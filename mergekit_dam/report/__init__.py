"""A page about a coefficient file, with plots; needs matplotlib (the extra `report`)."""

from mergekit_dam.report.page import HOW_TO_DRAW, can_draw, page_beside, write_page

__all__ = ["HOW_TO_DRAW", "can_draw", "page_beside", "write_page"]
