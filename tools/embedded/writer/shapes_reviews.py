"""Rules for reviews: {good} is a word of their own side, {bad} of the other one, {phrase} a clause of it."""

from __future__ import annotations

RULES = {
    "review": """
        <view> <about> <seems> <praise><more>.
        <view> <about> <seems> <praise><more>.
        <about> <seems> <praise><more>.
        <about> <seems> <praise><more>.
        <view> {phrase}<more>.
        {phrase}<more>.
        <short>.
        <short>; {phrase}.
        <despite>, but <about> <seems> <praise>.
        <despite>, but {phrase}.
        I find <about> <praise><more>.
        <found>, <about> <seems> <praise>.
    """,
    "view": """
        I think
        I must say that
        To be fair,
        All in all,
        Honestly,
        In my view
        Let me say that
        My {who} says that
        {open}
        In our house
        Since the first {~day}
        So far
        As for me,
        Between us,
    """,
    "about": """
        the {aspect}
        the {aspect}
        its {aspect}
        this {product}
        the {product}
        it
        my {product}
        our {product}
        the {aspect} of the {product}
        the {product} {where}
        everything about it
    """,
    "seems": """
        is
        is
        was
        feels
        looks
        seems
        turned out
        stays
        appears
        remains
    """,
    "praise": """
        {good}
        {good}
        {good}
        {good} and {good}
        {~very} {good}
        {good} to me
        {good} for the price
        {good} after {num} weeks
        {good} from the first {~day}
        as {good} as can be
        not {bad}
        not {bad} at all
        far from {bad}
        {good}, not {bad}
    """,
    "more": """
        -
        -
        -
        _and {phrase}
        ; {phrase}
        , so {phrase}
        , and so is the {aspect}
        , and the {aspect} <seems> {good}
        _{when}
        , and its {aspect} {good}
    """,
    "short": """
        what a {good} {product}
        a {good} {product}
        a {good}, {good} {product}
        {good} {aspect}, {good} {aspect}
        {good}, in one word
        {good} from start to end
        a {good} choice
        such a {good} {aspect}
        a {product} with a {good} {aspect}
        {good} {product}
    """,
    "despite": """
        the {aspect} may be {bad}
        the {aspect} looked {bad} at first
        friends warned me of a {bad} {aspect}
        I had heard of a {bad} {aspect}
        others call it {bad}
        I was told that it is {bad}
    """,
    "found": """
        I bought it {where}
        I got the {product} for a {who}
        after {num} weeks
        I use it {when}
        out of the box
        compared with others
    """,
    "neutral": """
        I <got> <which> {product}<since>.
        We <got> <which> {product}<since>.
        My {who} <got> <which> {product}<since>.
        The {product} came with a {x}<since>.
        It replaces <which> {product}<since>.
        The {aspect} is {how}<since>.
        The {product} stands {where}<since>.
    """,
    "got": """
        bought
        ordered
        have
        picked
        use
        needed
    """,
    "which": """
        this
        the
        a {how}
        my third
        the blue
        the larger
        an older
        a second
    """,
    "since": """
        -
        _{where}
        _for my {who}
        _for the weekend
        _for {num} weeks
        _last spring
        _as a present
        _in a shop
    """,
}
