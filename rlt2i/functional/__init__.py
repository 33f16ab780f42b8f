"""Pure torch functions, one per formula; no backbone, no configuration, no other part of rlt2i."""
