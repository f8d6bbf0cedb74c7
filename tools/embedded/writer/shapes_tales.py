"""Rules for quotations, stories and titles. `-` is the empty option, `_` a space at an end."""

from __future__ import annotations

RULES = {
    "quote": """
        <subject> <predicate><turn>.
        <subject> <predicate><turn>.
        <subject> <predicate><turn>.
        <saying> <subject> <predicate><turn>.
        <condition>, <main><turn>.
        <main><turn>.
        <advice><advice_turn>.
        <advice><advice_turn>.
        There is <one><place><turn>.
        There are <many><place>.
        There are <many><place>: {np} and {np}.
        {aim} and {aim} <both>.
        {whos} who {vp} <both>.
        {~good} {whos} <both>.
    """,
    "subject": """
        {aim}
        {aim}
        {aim}
        a {how} {who}
        the {mood} {who}
        a {x}
        a {x} shared with a {who}
        the {how} {x}
        the {x} of a {who}
        whoever {vps}
        he who {vps}
        a {who} without {aim}
        a {who} with a {how} {x}
        to {vp}
        a {~day} without {aim}
        {~only} {aim}
        no {who}
        life
    """,
    "predicate": """
        is {np}
        is a {how} {x}
        is a {how} {x} that {whos} {do}
        is {how}
        is {mood}
        {vps}
        {does} {np}
        {does} what {~people} {do}
        {~will} {vp}
        {~will} {do} your {x}
        can {do} a {how} {x}
        is {~only} {np}
        {~never} {vps}
        is like {np}
        is like a {who} {where}
        is worth {num} {xs}
        needs no {x}
        needs {np}
        begins with {aim}
        gives you {aim}
        costs nothing
        makes a {how} {who}
        matters more than {np}
        knows {aim}
    """,
    "turn": """
        -
        -
        -
        _{when}
        _{ly}
        , {~but} {aim} is {np}
        , {~but} {~only} {aim} {~will} {vp}
        , and {aim} {~will} follow
        , and {aim} finds it
        , {~but} not {np}
        _without {aim}
        _{~because} {aim} {does} it
        _{~when} {~people} {vp}
        _{~before} a {who} {does} it
        _if {aim} is {how}
        _and has {aim} to offer
    """,
    "saying": """
        They say that
        I {~learn} that
        Remember that
        Some say that
        We know that
        {open}
        My {~idea} is that
        {ly} speaking,
    """,
    "condition": """
        If you {vp}
        If {aim} is {np}
        If {aim} is {how}
        {~when} you {vp}
        {~when} a {who} {does} your {x}
        {~when} {aim} is lost
        Where {aim} lives
        Where {~people} {vp}
        {~before} you {vp}
        As long as we {vp}
        Without {aim}
        With a {how} {x}
    """,
    "main": """
        {vp}
        you {~will} {vp}
        you {~will} both have {aim}
        {aim} {~will} follow
        {aim} grows {ly}
        {np} {~will} wait for you
        there is {aim}
        {~never} {vp}
        a {who} {~will} {vp}
        {~every} {x} is {how}
        nobody can {do} a {x}
        {do} theirs in return
        we {vp}
    """,
    "advice": """
        {vp}
        {~never} {vp}
        do not {vp}
        be {how}
        be {mood}
        let your {x} be {how}
        give a {who} your {x}
        {do} a {how} {x}
        {do} the {x} of a {who}
        {~learn} to {vp}
        {~keep} {aim} close
        {do} your {x} {ly}
        never let a {x} stand {where}
    """,
    "advice_turn": """
        -
        , and {vp}
        , and {do} your {x} {ly}
        , and {aim} {~will} follow
        , and let your {aim} be {how}
        _{~before} you {vp}
        _as a {who} {does} a {x}
        , {~but} {~never} {vp}
        _{when}
        , {~because} {aim} is {np}
        , {~because} {aim} is {how}
        ; {aim} {~will} wait
        _and you {~will} have {aim}
    """,
    "one": """
        no {aim}
        {aim}
        {~very} {~small} {aim}
        a {x}
        a {how} {x}
        a {how} {who}
        one {x}
        one {how} {x}
    """,
    "many": """
        {num} {xs}
        {num} {how} {xs}
        {num} things
        {num} {mood} things
        {num} {how} things
        {num} kinds of {whos}
        {num} kinds of {aim}
        {~people}
        {whos}
    """,
    "place": """
        -
        _in {np}
        _in {~every} {who}
        _without {np}
        _that {whos} {do}
        _that a {who} should {do}
        _that matter to a {who}
        _that should matter {when}
        _for you
        _for {~every} {who}
        _{where}
    """,
    "both": """
        are {how}
        are {how} {xs}
        {do} {np}
        {do} {~small} {xs}
        {~never} {vp}
        {do} a {x} as if it were their own
        belong to {~every} {who}
        {~will} {vp}
        grow {ly}
        make a {how} {who}
        {~will} {~often} find {aim}
    """,
    "story": """
        <then><hero> <past><and_so>.
        <then><hero> <past><and_so>.
        <then><hero> <past><and_so>.
        "<line>," said <hero>.
        "<line>," said <hero> {ly}.
        "Where is {np}?" asked <hero>.
        It was {mood} {where}<and_so>.
        It was a {mood} {~day} {where}.
        There was {np} {where}<and_so>.
        There {name} <past><and_so>.
    """,
    "then": """
        -
        -
        -
        One {~day}_
        Then_
        Later_
        In the end_
        At last_
        {open}_
        All {~day}_
        After {num} days_
        So_
        Once_
        {where}_
    """,
    "hero": """
        {name}
        {name}
        {name}
        the {who}
        a {mood} {who}
        {name} the {who}
        {~someone}
        an old {who}
        the {mood} {who}
    """,
    "past": """
        {vped}
        {vped}
        {did} {np}
        was a {mood} {who}
        was {mood}
        lived {where}
        had {np}
        was {vping}
        {~often} {vped}
        {~never} {vped}
        found {np}
        saw {np}
        told {name} about {np}
        thought of {np}
        went to look for {np}
        gave {name} {np}
        became a {who}
        wanted to {vp}
    """,
    "and_so": """
        -
        -
        _and {vped}
        _{when}
        _{where}
        , {~because} {aim} was {mood}
        _{~when} a {who} {vped}
        , {~but} {name} {vped}
        _{~before} the {who} {vped}
        _with {np}
        _for {num} hours
        _and smiled {ly}
    """,
    "line": """
        {~help} me to {vp}
        I {~need} {np}
        you {~will} {vp}
        I {~want} to {vp}
        {~give} me {np}
        let us {vp}
        {~never} {vp}
        we {~need} {aim}
        the {who} {did} {np}
    """,
    "title": """
        On {topic}, {mood} throughout.
        About {topic}. In a {mood} voice.
        {topic}: a {mood} page.
        Pages on {topic}, written {ly}.
        Subject: {topic}. Manner: {mood}.
        All about {topic}, {mood} and {mood}.
        A {mood} text on {topic}, {x} and {x}.
        {topic}, {topic} and {~only} {topic}.
    """,
    "role_title": """
        Instructions.
        A role to play.
        How to act.
        Orders for a helper.
        Tasks and roles.
    """,
    "quote_title": """
        Sayings.
        Quotations.
        Words of the wise.
        Thoughts.
        A sentiment or two.
    """,
    "story_title": """
        A story.
        A tale of {name}.
        What happened to {name}.
        Short story.
        The life of {name}.
    """,
    "support_title": """
        Letters to a shop.
        Messages.
        Mail for the help desk.
        Customers write.
        Inbox.
    """,
}
