"""Gradient coding: who computes which parts of a gradient besides others, and how it is decoded.

Pure, like all policies. The fractions that a code assigns are *parts*; a part is made of whole
micro-batches. n workers, s of which may be missing; the *load* is the share of a global batch that
one worker computes in one round; a *gradient* is what one step of one model needs.

| module | holds |
|---|---|
| `codes` | codes of one round: FRC, C-code, CRC, cyclic MDS; decoders |
| `field` | the C-code of real workers: integers in a prime field, nothing is rounded |
| `exact` | integers through float64 and back without a wrong bit, or a refusal |
| `parts` | how a global batch is cut into parts |
| `stragglers` | models of stragglers, checked round by round |
| `sr_sgc`, `m_sgc` | sequential codes: what a round works on, when it may end, decoding |
| `sequential` | the same for workers that lease micro-batches: schedules, nothing is decoded |
| `delays` | how long workers take: recorded, fitted, generated, drawn again |
| `simulation` | how long a run would take under a scheme |
| `published` | the published rules, to compare with |
| `measuring` | what rounds that were run say of the delays |
| `adaptive` | a run under `auto`, in virtual time |
"""
