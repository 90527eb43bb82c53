"""Who a patient is, as the EHR corrects it: two records become one, and what then does not fit.

`merging` joins and parts two records, `rights` says who sees the one that is left, and
`contradictions` which studies say something else of their patient.
"""
