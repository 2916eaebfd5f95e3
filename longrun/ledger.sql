-- The index of jobs. The truth about what was trained is in the model's lineage; about bytes, in the folders.
create table if not exists job (
    number      integer primary key,         -- arrival order
    name        blob not null,               -- as dropped, in bytes
    state       text not null,               -- JobState
    arrived_at  real not null,               -- seconds since the epoch
    sha256      text not null default '',
    rows        integer not null default 0,
    format      text not null default '',
    on_bad_row  text not null default 'reject',
    attempts    integer not null default 0,  -- runs in a row that died without saving anything new
    reason      text not null default '',    -- JSON, when rejected
    record      text not null default ''     -- JSON of what the lineage said of it, when trained
);

create index if not exists job_by_state on job (state, number);
create index if not exists job_by_content on job (sha256);

-- Single facts that outlive a restart, such as the number of rows a device was seen to hold.
create table if not exists fact (
    name  text primary key,
    value text not null
);
